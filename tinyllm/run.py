"""What a run is (its identity), and whether its folder holds nothing, a part, or all of it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from tinyllm import run_folder
from tinyllm.data import Data
from tinyllm.errors import UserError
from tinyllm.fingerprint import fingerprint
from tinyllm.settings import Settings

PACKAGES = ("torch", "transformers", "peft", "accelerate")
# Settings that change nothing about the weights that come out.
WITHOUT_EFFECT = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name", "report_to",
    "logging_steps", "logging_strategy", "logging_first_step", "disable_tqdm", "log_level",
    "save_steps", "save_strategy", "save_total_limit", "eval_steps", "eval_strategy",
    "per_device_eval_batch_size", "num_sample_replies", "save_full_model", "eval_dataset",
    "eval_share", "base_model_path", "dataset", "data_cache", "preview", "local_rank", "chunked_loss",
}  # fmt: skip
CHECKPOINT_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@dataclass
class Run:
    """A run about to start: its folder, what it is, and where to go on from."""

    folder: Path
    identity: dict
    settings: dict
    resume_from: str | None = None
    already_finished: bool = False


def open_run(settings: Settings, tokenizer, data: Data) -> Run:
    """Claim the run folder; nothing in it is ever overwritten silently.

    Raises:
        UserError: the folder holds another run, or something that is no run at all.
    """
    from tinyllm.sft import say

    folder = settings.output_dir
    run = Run(folder, identity_of(settings, tokenizer, data), flat_settings(settings))
    if settings.run.overwrite_output_dir:
        aside = run_folder.move_aside(folder)
        say(f"moved the earlier {folder} aside to {aside}" if aside else "nothing to move aside")
    found = run_folder.look(folder)
    if found.status != "new":
        _take_up(run, found, settings, say)
    if not run.already_finished:
        run_folder.create(folder)
        if int(os.environ.get("RANK", "0")) == 0:
            run_folder.write_json(folder / run_folder.DATA_REPORT, data.ledger.report())
            write_run_file(run, "running")
    return run


def _take_up(run: Run, found: run_folder.Found, settings: Settings, say) -> None:
    """Decide about a folder that already holds a run."""
    anew = "start anew with --overwrite_output_dir True (the old run is kept, moved aside), "
    anew += "or choose another --output_dir (OUTPUT_DIR=...)"
    changed = run_folder.difference(_flat(found.identity), _flat(run.identity))
    if changed:
        raise UserError(
            f"{run.folder} holds a {found.status} run of another kind: {changed}; {anew}"
        )
    if found.status == "finished":
        say(f"{run.folder} already holds this very run, finished: nothing to do; {anew}")
        run.already_finished = True
        return
    run.resume_from = settings.training.resume_from_checkpoint or last_checkpoint(run.folder)
    if run.resume_from:
        say(f"going on with an unfinished run, from {run.resume_from}")
    else:
        say(
            f"{run.folder} holds a run that was interrupted before its first checkpoint: from step 1"
        )


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that has everything needed to go on exactly."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.rsplit("-", 1)[1].isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.rsplit("-", 1)[1]), reverse=True):
        if all((path / name).is_file() for name in CHECKPOINT_FILES):
            return str(path)
    return None


def identity_of(settings: Settings, tokenizer, data: Data) -> dict:
    """Everything that decides which weights come out."""
    flat = flat_settings(settings)
    return {
        "base": fingerprint(settings.base.base_model_path, tokenizer),
        "data": data.train.digest,
        "settings": {k: v for k, v in flat.items() if k not in WITHOUT_EFFECT},
    }


def flat_settings(settings: Settings) -> dict:
    """Our settings in full, and those of TrainingArguments that differ from its defaults."""
    ours: dict = {}
    for part in (settings.base, settings.lora, settings.data, settings.run):
        ours |= asdict(part)
    default = type(settings.training)(output_dir="x", use_cpu=settings.training.use_cpu).to_dict()
    training = settings.training.to_dict()
    always = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "lr_scheduler_type",
              "gradient_accumulation_steps", "warmup_steps", "seed", "output_dir")  # fmt: skip
    chosen = {k: v for k, v in training.items() if k in always or v != default.get(k)}
    return ours | chosen


def write_run_file(run: Run, status: str, **more) -> None:
    """Write ``run.json``: the run's identity, settings and versions."""
    content = {
        "status": status,
        "identity": run.identity,
        "settings": run.settings,
        "versions": {name: version(name) for name in PACKAGES},
        **more,
    }
    run_folder.write_json(run.folder / run_folder.RUN_FILE, content)


def _flat(identity: dict) -> dict:
    """``{"base": {"weights": h}, "data": d}`` → ``{"base weights": h, "data": d}``."""
    flat: dict = {}
    for name, value in identity.items():
        if isinstance(value, dict):
            prefix = "" if name == "settings" else f"{name} "
            flat |= {f"{prefix}{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat
