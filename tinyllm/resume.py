"""Which checkpoint a run goes on from, and why not from another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tinyllm import checkpoint
from tinyllm.base import read_json
from tinyllm.errors import UserError
from tinyllm.json_lines import read_lines, write_lines
from tinyllm.precision import same_name
from tinyllm.run_folder import difference
from tinyllm.settings import BaseSettings, DataSettings, LoraSettings, RunSettings

YES, NO = ("true", "yes", "1"), ("false", "no", "0", "none")


def parse_choice(value: str | bool | None) -> str | bool | None:
    """``--resume_from_checkpoint``: True, False, a path, or None for "as it comes"."""
    text = str(value).strip().lower()
    if value is None or text == "":
        return None
    if text in YES and not Path(str(value)).exists():
        return True
    return False if text in NO and not Path(str(value)).exists() else str(value)


def newest(folder: Path, identity: dict, say: Callable[[str], None]) -> str | None:
    """The newest checkpoint of a folder that one can go on from exactly; skipped ones are named."""
    for one in checkpoint.find(folder):
        reason = checkpoint.problem(one.path) or foreign(one.path, identity)
        if reason is None:
            return str(one.path)
        say(f"skipped {one.path}: {reason}")
    return None


def chosen(path: Path, identity: dict, say: Callable[[str], None]) -> str:
    """The checkpoint that the user names, or the newest of the run folder that they name.

    Raises:
        UserError: it cannot be gone on from; no other is taken in its place.
    """
    if not path.is_dir():
        raise UserError(f"--resume_from_checkpoint {path}: no such folder")
    if not (path / checkpoint.MANIFEST).is_file() and checkpoint.find(path):
        found = newest(path, identity, say)
        if found is None:
            raise UserError(f"--resume_from_checkpoint {path}: none of its checkpoints can be used")
        return found
    if reason := checkpoint.problem(path) or foreign(path, identity):
        raise UserError(f"--resume_from_checkpoint {path}: {reason}")
    return str(path)


def foreign(path: Path, identity: dict) -> str | None:
    """Why a sound checkpoint does not belong to this run, None when it does."""
    stored = checkpoint.read_manifest(path)["identity"]
    changed = difference(flat(stored), flat(without_news(stored, identity)))
    return f"it is from another run: {changed}" if changed else None


def without_news(stored: dict, now: dict) -> dict:
    """An identity without the settings that an older run did not know yet, where they do nothing new.

    A setting that came with an update and stands at its default must not part a run from itself.
    """
    parts = (BaseSettings, LoraSettings, DataSettings, RunSettings)
    defaults = {name: value for part in parts for name, value in asdict(part()).items()}
    known = stored.get("settings", {})
    kept = {
        name: value
        for name, value in now["settings"].items()
        if name in known or name not in defaults or value != defaults[name]
    }
    return now | {"settings": kept}


def trim_log(path: Path, resume_from: str | None) -> None:
    """Drop the log lines that the run will write again: those its checkpoint knows nothing of."""
    if not path.is_file():
        return
    last, known = _history(resume_from)
    write_lines(path, [e for e in read_lines(path) if e["step"] < last or e in known])


def _history(resume_from: str | None) -> tuple[int, list[dict]]:
    """The step of a checkpoint, and what had been logged by then."""
    if resume_from is None:
        return -1, []
    state = read_json(Path(resume_from) / checkpoint.TRAINER_STATE)
    return state["global_step"], state["log_history"]


def loss_before_training(path: Path) -> float | None:
    """The held-out loss of step 0, from the log of the run that is gone on with."""
    found = [e["eval_loss"] for e in read_lines(path) if e["step"] == 0 and "eval_loss" in e]
    return found[0] if found else None


def flat(identity: dict) -> dict:
    """``{"base": {"weights": h}, "data": d}`` → ``{"base weights": h, "data": d}``."""
    out: dict = {}
    for name, value in identity.items():
        if isinstance(value, dict):
            prefix = "" if name == "settings" else f"{name} "
            if name == "settings":
                value = same_name(value, identity.get("device", ""))
            out |= {f"{prefix}{key}": inner for key, inner in value.items()}
        else:
            out[name] = value
    return out
