"""The run folder's README.md: what was trained on what, what came out, how to load it."""

from __future__ import annotations

from tinyllm.report.texts import verdict_line

CAUTION = (
    "A small model: it answers what it has seen, and invents the rest. Do not rely on its facts."
)


def model_card(run: dict, metrics: dict | None = None) -> str:
    """Markdown of the model card, from the content of ``run.json`` and the report's metrics."""
    settings = run["settings"]
    base, name = settings["base_model_path"], "LoRA" if settings["use_lora"] else "Fine-tune"
    parts = [
        front_matter(settings), f"# {name} of {base}", facts(run), evidence(run, metrics),
        limits(metrics), usage(settings),
        f"The system prompt of the training was: {settings['system_prompt'] or '(none)'}",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def front_matter(settings: dict) -> str:
    """What model hubs read."""
    library, tags = ("peft", "lora, sft") if settings["use_lora"] else ("transformers", "sft")
    return (
        f"---\nbase_model: {settings['base_model_path']}\nlibrary_name: {library}\n"
        f"pipeline_tag: text-generation\ntags: [{tags}]\n---"
    )


def facts(run: dict) -> str:
    """Base, data and settings."""
    settings, data, results = run["settings"], run["data"], run["results"]
    identity = run["identity"]
    rows = [
        ("base", f"`{settings['base_model_path']}` (weights {identity['base']['weights'][:12]})"),
        ("data", f"{', '.join(settings['dataset'])} (digest {identity['data'][:12]})"),
        ("examples", f"{data['num_examples']:,} for training, {data['num_held_out']:,} held out"),
        ("supervised tokens", f"{data['num_supervised']:,} of {data['num_tokens']:,} per epoch"),
        ("refused, dropped, shortened rows", f"{data['num_rows_refused']:,}, "
         f"{data['num_dropped']:,}, {data['num_shortened']:,}"),
        ("learning rate", f"{settings['learning_rate']}, {settings['lr_scheduler_type']}"),
        ("epochs, steps", f"{results['epoch']:g}, {results['num_steps']}"),
        ("training loss (mean)", f"{results['train_loss']:.4f}"),
        ("held-out loss", _held_out(results)),
    ]  # fmt: skip
    if settings.get("adapter_path"):
        rows.insert(4, ("LoRA", f"`{settings['adapter_path']}`, trained further"))
    elif settings["use_lora"]:
        targets = ", ".join(settings["lora_target_modules"])
        rows.insert(4, ("LoRA", f"r {settings['lora_r']}, alpha {settings['lora_alpha']}, "
                        f"dropout {settings['lora_dropout']}, {targets}"))  # fmt: skip
    return _table(("what", "value"), rows)


def evidence(run: dict, metrics: dict | None) -> str:
    """The verdict and what it rests on."""
    if metrics is None:
        folder = run["settings"]["output_dir"]
        return f"## Did it work?\n\nNot measured yet: `python -m tinyllm.report {folder}`."
    found = metrics["evidence"]
    rows = []
    for label, part, name, form in (
        ("held-out loss", "held_out", "loss", "{:.4f}"),
        ("held-out perplexity", "held_out", "perplexity", "{:.4f}"),
        ("held-out token accuracy", "held_out", "token_accuracy", "{:.1%}"),
        ("end token after a right answer", "held_out", "stop_probability", "{:.1%}"),
        ("loss on general text (forgetting)", "general", "loss", "{:.4f}"),
    ):
        if found[part]:
            rows.append((label, *(form.format(found[part][side][name]) for side in ("off", "on"))))
    if found["stop"]["replies"]:
        rows.append(("replies that stop", *(f"{found['stop'][s]:.1%}" for s in ("off", "on"))))
    table = _table(("measured", "without", "with"), rows)
    verdict = verdict_line(metrics["verdict"], "en")
    return (
        f"## Did it work?\n\n**{verdict}**\n\n{table}\n\nThe losses are nats per supervised token, "
        "both on the same rows. All of it: `metrics.json` and `report.html`."
    )


def limits(metrics: dict | None) -> str:
    """What a reader should not expect."""
    lines = [CAUTION]
    if metrics and (held_out := metrics["evidence"]["held_out"]):
        lines.append(
            f"The numbers come from {held_out['rows']} held-out rows of the same kind as the "
            "training rows; they say nothing about other kinds of questions."
        )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def usage(settings: dict) -> str:
    """How to load it: merged, beside its base, and with peft alone."""
    base, folder = settings["base_model_path"], settings["output_dir"]
    if not settings["use_lora"]:
        return f"""## Use

```bash
python inference_lora.py --base_model {folder}
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""
    # peft alone does not make room for the tokens that this run has added
    rows = f'len(AutoTokenizer.from_pretrained("{folder}"))'
    resize = f"base.resize_token_embeddings({rows})\n" if settings.get("new_special_tokens") else ""
    return f"""## Use

```bash
python inference_lora.py --base_model {base} --lora_model {folder} --merge_weights
```

Merged into the base, for inference:

```python
from load_lora_model import load_lora_model

model, tokenizer = load_lora_model("{base}", "{folder}")
```

Beside the base, `is_trainable=True` to train it further:

```python
from load_lora_model import load_lora_model_without_merge

model, tokenizer = load_lora_model_without_merge("{base}", "{folder}")
```

With peft alone:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}")
{resize}model = PeftModel.from_pretrained(base, "{folder}").merge_and_unload()
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""


def _table(head: tuple, rows: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _held_out(results: dict) -> str:
    if results["eval_loss"] is None:
        return "not measured"
    before = results["eval_loss_before"]
    start = f" ({before:.4f} before the training)" if before is not None else ""
    return f"{results['eval_loss']:.4f}{start}"
