"""The run folder's contract: which files a finished run leaves, and what a folder already holds.

``run.json`` is the folder's own statement: written as "running" when a run starts, and as
"finished" when everything else is in place, so that a folder without it was never completed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tinyllm.base import read_json
from tinyllm.errors import UserError
from tinyllm.lock import LOCK_FILE

RUN_FILE = "run.json"
LOG_FILE = "training_log.jsonl"
DATA_REPORT = "data_report.json"
FINGERPRINT_FILE = "base_fingerprint.json"
CERTIFICATE = "merge_certificate.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
RESULT_FILES = (
    "train_results.json",
    "eval_results.json",
    "all_results.json",
    "trainer_state.json",
    LOG_FILE,
)
REPORT_FILES = ("report.html", "metrics.json")
REPLIES = "eval_replies.jsonl"
LINEAGE = "lineage.jsonl"
MODEL_CARD = "README.md"
FULL_MODEL = "pytorch_model.bin"
LORA_START = "lora_start.safetensors"  # only of a run with --init_lora_weights pissa or olora

FINISHING = ".finishing"  # where the final files are written before they are moved in
NAMED = 3  # differences that are told in full

# What a LoRA run with a held-out set leaves beside its checkpoint-N folders.
FINAL_FILES = (
    *ADAPTER_FILES, FINGERPRINT_FILE, *TOKENIZER_FILES, *RESULT_FILES, *REPORT_FILES, LINEAGE,
    DATA_REPORT, MODEL_CARD, RUN_FILE,
)  # fmt: skip
# What it may leave besides: a picture (with matplotlib), logs of TensorBoard, replies on the way.
OPTIONAL_FILES = ("training_loss.png", "runs", REPLIES, CERTIFICATE)


@dataclass(frozen=True)
class Found:
    """What lies in an output folder: ``status`` is new, running or finished."""

    status: str
    identity: dict


def look(folder: Path) -> Found:
    """See what an output folder holds, without changing it.

    Raises:
        UserError: there is something in it that no run of ours has left.
    """
    if not folder.exists():
        return Found("new", {})
    if not folder.is_dir():
        raise UserError(f"--output_dir {folder}: a file of that name is in the way")
    if all(path.name == LOCK_FILE for path in folder.iterdir()):
        return Found("new", {})
    if not (folder / RUN_FILE).is_file():
        raise UserError(
            f"--output_dir {folder}: the folder holds other things than a run of ours; "
            "choose another, or --overwrite_output_dir True to move it aside"
        )
    run = read_json(folder / RUN_FILE)
    return Found(run.get("status", "running"), run.get("identity", {}))


def difference(before: dict, now: dict) -> str | None:
    """Name the settings in which two runs differ, None when they are the same."""
    names = [n for n in sorted(before.keys() | now.keys()) if before.get(n) != now.get(n)]
    said = [
        f"{n} was {_short(before.get(n))}, is now {_short(now.get(n))}" for n in names[:NAMED]
    ]  # fmt: skip
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return "; ".join(said) + more if names else None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def move_aside(folder: Path) -> Path | None:
    """Rename an existing folder to ``NAME.old-N`` (nothing is deleted); None if there is none."""
    if not folder.exists():
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside


def create(folder: Path) -> None:
    """Make the folder and prove that it can be written, before any work is done.

    Raises:
        UserError: it cannot be written.
    """
    with clear_if_unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.write_text("")
        probe.unlink()


@contextlib.contextmanager
def clear_if_unwritable(folder: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: cannot be written: {error.strerror or error}"
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Remove final files that a killed process did not move in."""
    for name in (FINISHING, ".reporting"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in folder.glob(".*.tmp"):
        path.unlink()


def write_json(path: Path, content: dict) -> None:
    """Write JSON whole or not at all: beside the target, synced, then renamed onto it."""
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("w", encoding="utf-8") as out:
        json.dump(content, out, ensure_ascii=False, indent=2, sort_keys=True)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
    scratch.replace(path)


def publish(scratch: Path, folder: Path) -> None:
    """Move finished files into the run folder, each by an atomic rename."""
    for path in sorted(scratch.iterdir()):
        path.chmod(0o644)
        path.replace(folder / path.name)
    shutil.rmtree(scratch)


def missing_files(folder: Path, expected: tuple[str, ...]) -> list[str]:
    """The contract's files that are not there."""
    return [name for name in expected if not (folder / name).is_file()]
