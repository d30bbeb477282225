"""Checkpoints of a pretraining run: one file each, written whole or not at all."""

import logging
import os
import re
from pathlib import Path

import torch

from tinyllm.errors import UserError

log = logging.getLogger(__name__)


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*.pt") if re.fullmatch(r"step-\d{7}\.pt", p.name))


def save(folder: Path, state: dict, keep: int) -> Path:
    """Write `step-<number>.pt` (a kill leaves only a `.tmp`), then drop all but the last `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{state['step']:07d}.pt"
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def load(path: Path) -> dict:
    """The saved state; tensors and plain values only."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path} does not exist") from error


def require_last(folder: Path) -> Path:
    """The newest finished checkpoint, which must be there."""
    if (path := last(folder)) is None:
        raise UserError(f"{folder} has no checkpoint")
    return path


def last(folder: Path) -> Path | None:
    """The newest finished checkpoint, or None."""
    found = list_checkpoints(folder)
    return found[-1] if found else None
