"""The end of a run: everything into the run folder, checked, then what came out."""

from __future__ import annotations

import copy
import re
import shlex
import sys
from pathlib import Path

import torch

from tinyllm import run_folder
from tinyllm.adapter import BIN, SAFETENSORS, read_weights
from tinyllm.base import read_json
from tinyllm.base_record import base_record
from tinyllm.chat_format import chat_format_of
from tinyllm.data import Data
from tinyllm.errors import UserError
from tinyllm.generate import generate_reply
from tinyllm.lora_start import take_start_off
from tinyllm.merge import merge
from tinyllm.model_card import model_card
from tinyllm.report import plots
from tinyllm.report.evidence import measure
from tinyllm.report.files import PAGE
from tinyllm.report.texts import verdict_line
from tinyllm.report.write import write_report
from tinyllm.run import Run, write_run_file
from tinyllm.saved_adapter import check_saved_adapter, has_learned
from tinyllm.settings import Settings
from tinyllm.sharded import is_sharded, whole_state
from tinyllm.tokenizer_files import save_tokenizer


def finish(settings: Settings, trainer, run: Run, data: Data, results: dict) -> None:
    """Write the final files beside the folder's own, check them, move them in, close the run.

    Raises:
        UserError: what was written cannot be read back as it should.
    """
    lora = settings.lora.use_lora
    state = whole_state(trainer.model) if is_sharded(trainer.args) else None
    if trainer.is_world_process_zero():
        scratch = run.folder / run_folder.FINISHING
        scratch.mkdir(exist_ok=True)
        write = write_adapter if lora else write_whole_model
        write(trainer.model, scratch, state)
        if lora:
            write_base_record(settings, trainer, scratch)
        save_tokenizer(trainer.processing_class, scratch)
        if lora and settings.run.save_full_model:
            write_merged_bin(trainer.model, scratch)
        run_folder.publish(scratch, run.folder)
        more = {"data": data.summary, "results": results}
        write_run_file(run, "running", **more)
        reported = write_evidence(settings, trainer, run, data)
        if lora:
            _check(run.folder, trainer, reported, has_held_out=results["eval_loss"] is not None)
        write_run_file(run, "finished", **more)
    trainer.accelerator.wait_for_everyone()


def write_evidence(settings: Settings, trainer, run: Run, data: Data) -> bool:
    """Measure what the training changed, and write the model card; returns whether there is a report.

    A report that fails costs the report, never the run: the adapter is trained and in its place.
    """
    metrics = None
    if has_report(settings, trainer):
        try:
            metrics = write_whole_report(settings, trainer, run, data)
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            print(
                f"warning: no report: {reason}; everything else is in place; "
                f"python -m tinyllm.report {run.folder} --measure",
                file=sys.stderr,
            )
    elif settings.run.report:
        again = f"python -m tinyllm.report {run.folder}"
        print(
            f"no report yet: with ZeRO-3 no process holds the whole model; {again}", file=sys.stderr
        )
    card = model_card(read_json(run.folder / run_folder.RUN_FILE), metrics)
    (run.folder / run_folder.MODEL_CARD).write_text(card, encoding="utf-8")
    return metrics is not None


def write_whole_report(settings: Settings, trainer, run: Run, data: Data) -> dict:
    """Measure, write the report, say the verdict; returns the metrics."""
    tokenizer = trainer.processing_class
    evidence = measure(trainer.model, tokenizer, chat_format_of(tokenizer), settings, data)
    metrics = write_report(run.folder, evidence, settings.run.lang)
    if not plots.can_draw():
        print(f"note: {plots.MISSING}", file=sys.stderr)
    print(verdict_line(metrics["verdict"], settings.run.lang), file=sys.stderr)
    print(f"report: {run.folder / PAGE}", file=sys.stderr, flush=True)
    return metrics


def has_report(settings: Settings, trainer) -> bool:
    """Whether the run measures itself at its end; with ZeRO-3 that is done afterwards."""
    return settings.run.report and not is_sharded(trainer.args)


def write_base_record(settings: Settings, trainer, folder: Path) -> None:
    """Write the fingerprint of the base and the golden ids, which the loaders check."""
    record = base_record(
        settings.base.base_model_path, trainer.processing_class, settings.data.system_prompt,
        settings.base.trust_remote_code,
    )  # fmt: skip
    run_folder.write_json(folder / run_folder.FINGERPRINT_FILE, record)


def write_adapter(model, folder: Path, state: dict | None = None) -> None:
    """Write the adapter twice, as ``.safetensors`` and as the ``.bin`` that the guide names.

    Args:
        state: the trained weights, where the model itself does not hold them whole.
    """
    # the embeddings are the base's; what is trained of them is in the adapter without this
    options = {"state_dict": state, "save_embedding_layers": False}
    model.save_pretrained(folder, safe_serialization=False, **options)
    model.save_pretrained(folder, **options)
    config = read_json(folder / "adapter_config.json")
    if isinstance(config["target_modules"], list):
        config["target_modules"] = sorted(config["target_modules"])  # a set: its order is random
    if getattr(model, "lora_start", None):
        config = take_start_off(folder, config, model.lora_start)
    run_folder.write_json(folder / "adapter_config.json", config)
    first, second = read_weights(folder / SAFETENSORS), read_weights(folder / BIN)
    same = first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert same, "the two adapter files differ"


def write_whole_model(model, folder: Path, state: dict | None = None) -> None:
    """Write a model trained without LoRA, in transformers' own layout."""
    model.save_pretrained(folder, state_dict=state)


def write_merged_bin(model, folder: Path) -> None:
    """Write ``pytorch_model.bin``: the base with the adapter merged in, in float32."""
    merged = merge(copy.deepcopy(model), torch.float32)
    torch.save(merged.state_dict(), folder / run_folder.FULL_MODEL)
    merged.config.save_pretrained(folder)


def _check(folder: Path, trainer, with_report: bool, has_held_out: bool) -> None:
    """Open what was written, as a user would."""
    without = () if has_held_out else ("eval_results.json",)
    without += () if with_report else run_folder.REPORT_FILES
    expected = tuple(name for name in run_folder.FINAL_FILES if name not in without)
    missing = run_folder.missing_files(folder, expected)
    if missing:
        raise UserError(f"{folder}: {', '.join(missing)} were not written")
    adapter = check_saved_adapter(folder, trainer.model, has_learned(trainer.state))
    if not adapter.has_effect:
        print(
            "warning: the adapter has no effect, every B matrix is zero; were there any steps, "
            "and is the learning rate above 0?",
            file=sys.stderr,
        )


def show_samples(settings: Settings, trainer, chat_format, data: Data) -> None:
    """Print replies to a few held-out questions, and the command to chat."""
    if not trainer.is_world_process_zero():
        return
    records = data.sample_records[: settings.run.num_sample_replies]
    if is_sharded(trainer.args):
        print("no sample replies: with ZeRO-3 no process holds the whole model", file=sys.stderr)
        records = []
    model = trainer.model.eval()
    for record in records:
        messages = [m for m in record.messages if m["role"] == "system"][:1]
        messages += [m for m in record.messages if m["role"] == "user"][:1]
        if messages[0]["role"] != "system" and settings.data.system_prompt:
            messages.insert(0, {"role": "system", "content": settings.data.system_prompt})
        reply = generate_reply(model, trainer.processing_class, chat_format, messages)
        print(f"\n用户: {messages[-1]['content']}\n助手: {reply.text}")
    print(f"\nchat with it:\n{chat_command(settings)}", flush=True)


def chat_command(settings: Settings) -> str:
    """The command that chats with what this run has made."""
    folder = quoted(settings.training.output_dir)
    if not settings.lora.use_lora:
        return f"python inference_lora.py --base_model {folder}"
    code = " --trust_remote_code" if settings.base.trust_remote_code else ""
    return (
        "python inference_lora.py \\\n"
        f"    --base_model {quoted(settings.base.base_model_path)} \\\n"
        f"    --lora_model {folder} \\\n"
        f"    --system_prompt {quoted(settings.data.system_prompt)} \\\n"
        f"    --merge_weights{code}"
    )


def quoted(text: str) -> str:
    """A word for a shell, in the double quotes of the guide where they are enough."""
    if re.fullmatch(r"[\w./:=@%+-]+", text, re.ASCII):
        return text
    return shlex.quote(text) if re.search(r'["$`\\!]', text) else f'"{text}"'
