"""The run folder's README.md: what was trained on what, what came out, how to load it."""

from __future__ import annotations


def model_card(run: dict) -> str:
    """Markdown of the model card, from the content of ``run.json``."""
    settings, data, results = run["settings"], run["data"], run["results"]
    base, folder = settings["base_model_path"], settings["output_dir"]
    return f"""---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags: [lora, sft]
---

# LoRA of {base}

| what | value |
|---|---|
| base | `{base}` (weights {run["identity"]["base"]["weights"][:12]}) |
| data | {", ".join(settings["dataset"])} (digest {run["identity"]["data"][:12]}) |
| examples | {data["num_examples"]:,} for training, {data["num_held_out"]:,} held out |
| supervised tokens | {data["num_supervised"]:,} of {data["num_tokens"]:,} per epoch |
| LoRA | r {settings["lora_r"]}, alpha {settings["lora_alpha"]}, dropout {settings["lora_dropout"]}, \
{", ".join(settings["lora_target_modules"])} |
| learning rate | {settings["learning_rate"]}, {settings["lr_scheduler_type"]} |
| epochs, steps | {results["epoch"]:g}, {results["num_steps"]} |
| training loss (mean) | {results["train_loss"]:.4f} |
| held-out loss | {_held_out(results)} |

The losses are nats per supervised token. A small model: it answers what it has seen, and invents
the rest. Do not rely on its facts.

## Use

```bash
python inference_lora.py --base_model {base} --lora_model {folder} --merge_weights
```

```python
from load_lora_model import load_lora_model

model, tokenizer = load_lora_model("{base}", "{folder}")
```

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{folder}").merge_and_unload()
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

The system prompt of the training was: {settings["system_prompt"] or "(none)"}
"""


def _held_out(results: dict) -> str:
    if results["eval_loss"] is None:
        return "not measured"
    before = results["eval_loss_before"]
    start = f" ({before:.4f} before the training)" if before is not None else ""
    return f"{results['eval_loss']:.4f}{start}"
