"""Measure a run again from its folder: the base, the adapter and the data as ``run.json`` names them."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

from tinyllm import run_folder
from tinyllm.base import read_json
from tinyllm.errors import UserError
from tinyllm.settings import (
    BaseSettings,
    DataSettings,
    LoraSettings,
    RunSettings,
    Settings,
    SftArguments,
)


def measure_again(folder: Path, base_model: str | None, probe_prompts: str | None) -> dict:
    """Load what a run has made, as a user would, and measure it.

    Args:
        base_model: the base's folder, where it is not the one that the run names.
        probe_prompts: file with questions, in place of the run's own.

    Raises:
        UserError: the run is not finished, or its base, adapter or data are not there.
    """
    from tinyllm.chat_format import chat_format_of
    from tinyllm.report.evidence import measure
    from tinyllm.sft import load_examples

    run = read_json(folder / run_folder.RUN_FILE)
    if run.get("status") != "finished":
        raise UserError(f"{folder}: the run is not finished; start its command again to go on")
    settings = settings_of(run, folder)
    settings.base.base_model_path = base_model or settings.base.base_model_path
    settings.run.probe_prompts = probe_prompts or settings.run.probe_prompts
    model, tokenizer = load_trained(settings, folder)
    chat_format = chat_format_of(tokenizer)
    data, _ = load_examples(settings, model, chat_format)
    if data.train.digest != run["identity"]["data"]:
        print("note: the data files are not those of the training any more", file=sys.stderr)
    return measure(model, tokenizer, chat_format, settings, data)


def settings_of(run: dict, folder: Path) -> Settings:
    """The run's settings, as far as measuring needs them."""
    saved = run["settings"]

    def part(kind):
        names = {field.name for field in fields(kind)}
        return kind(**{name: value for name, value in saved.items() if name in names})

    import torch

    arguments = SftArguments(
        output_dir=str(folder), use_cpu=not torch.cuda.is_available(), seed=saved.get("seed", 42),
        eval_strategy="no", report_to=[],
    )  # fmt: skip
    return Settings(
        part(BaseSettings), LoraSettings(), part(DataSettings), part(RunSettings), arguments
    )


def load_trained(settings: Settings, folder: Path):
    """``(model, tokenizer)``: the base with the adapter beside it, or the model trained whole."""
    from tinyllm.adapter import load_adapter_on_base
    from tinyllm.base import load_base, pick_device, pick_dtype
    from tinyllm.packing_check import choose_packing

    base, device = settings.base, pick_device()
    if (folder / "adapter_config.json").is_file():
        model, tokenizer = load_adapter_on_base(
            base.base_model_path, folder, torch_dtype=base.torch_dtype,
            trust_remote_code=base.trust_remote_code,
        )  # fmt: skip
        choose_packing(model.get_base_model())
        return model, tokenizer
    model, tokenizer = load_base(folder, pick_dtype(base.torch_dtype, device), device)
    choose_packing(model)
    return model, tokenizer
