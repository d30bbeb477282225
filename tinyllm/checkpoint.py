"""Checkpoints that are complete or absent, and can tell.

A checkpoint is filled in ``.checkpoint-N.writing``, synced to the disk, given a manifest (name, size
and SHA-256 of every file, and what the run is), and only then renamed to ``checkpoint-N``.  A kill at
any moment leaves the older ones as they were, and something hidden that the next start removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tinyllm.file_hash import hash_file
from tinyllm.pickles import unsafe_pickle

MANIFEST = "manifest.json"
NAME = re.compile(r"checkpoint-(\d+)")
HIDDEN = re.compile(r"\.(checkpoint-\d+)\.(writing|replaced|deleting)")
TRAINER_STATE = "trainer_state.json"
WEIGHTS = re.compile(r"adapter_model\.(safetensors|bin)|(model|pytorch_model).*\.(safetensors|bin)")
# The optimizer, as torch, FSDP and DeepSpeed write it.
OPTIMIZER = re.compile(r"optimizer\.(pt|bin)|optimizer_\d+/.*|global_step\d+/.*optim_states\.pt")
SCHEDULER = re.compile(r"scheduler\.pt|global_step\d+/.*model_states\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """A folder named ``checkpoint-N``, complete or not."""

    path: Path
    step: int


def find(folder: Path) -> list[Checkpoint]:
    """Every ``checkpoint-N`` of a run folder, the newest first."""
    named = ((path, NAME.fullmatch(path.name)) for path in folder.glob("checkpoint-*"))
    found = [Checkpoint(path, int(match[1])) for path, match in named if match and path.is_dir()]
    return sorted(found, key=lambda one: one.step, reverse=True)


def scratch_of(target: Path) -> Path:
    """Where a checkpoint is filled before it takes its name."""
    return target.with_name(f".{target.name}.writing")


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half written or half deleted."""
    for path in sorted(folder.glob(".checkpoint-*")):
        if not (match := HIDDEN.fullmatch(path.name)):
            continue
        target = folder / match[1]
        if match[2] == "replaced" and not target.exists():
            path.rename(target)  # killed between the two renames: the old one comes back
        else:
            shutil.rmtree(path)


def seal(scratch: Path, target: Path, about: dict) -> None:
    """Sync a filled folder, write its manifest, and give it its name.

    Args:
        about: what else the manifest says: step, processes, identity of the run.

    Raises:
        OSError: it cannot be written.
    """
    files = {}
    for path in _files(scratch):
        _sync(path)
        files[path.relative_to(scratch).as_posix()] = {
            "size": path.stat().st_size, "sha256": hash_file(path),
        }  # fmt: skip
    _write_manifest(scratch / MANIFEST, {**about, "files": files})
    for folder in {path.parent for path in _files(scratch)}:
        _sync(folder)
    _replace(scratch, target)
    _sync(target.parent)


def prune(folder: Path, limit: int | None, keep: set[str]) -> None:
    """Delete the oldest complete checkpoints beyond ``limit``, never those named in ``keep``."""
    if not limit or limit < 0:
        return
    sealed = [one for one in find(folder) if (one.path / MANIFEST).is_file()]
    too_many = len(sealed) - max(limit, len(keep))
    for old in [one for one in reversed(sealed) if one.path.name not in keep][: max(0, too_many)]:
        # renamed first, so that a kill in between leaves no checkpoint with files missing
        doomed = old.path.with_name(f".{old.path.name}.deleting")
        shutil.rmtree(doomed, ignore_errors=True)
        old.path.rename(doomed)
        shutil.rmtree(doomed)


def read_manifest(path: Path) -> dict:
    """The manifest of a checkpoint.

    Raises:
        ValueError: there is none, or it is damaged; the text says which.
    """
    try:
        stored = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        content, digest = stored["content"], stored["sha256"]
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}, so it was never completed") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read") from error
    if hashlib.sha256(_canonical(content)).hexdigest() != digest:
        raise ValueError(f"its {MANIFEST} is damaged")
    return content


def problem(path: Path) -> str | None:
    """Why a checkpoint cannot be gone on from, None when it can: every byte is looked at."""
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return str(error)
    return (
        _lacking_state(manifest) or _damaged_file(path, manifest) or unsafe_pickle(path, _files(path))
    )  # fmt: skip


def _lacking_state(manifest: dict) -> str | None:
    """What is not there that training needs to go on exactly."""
    files = manifest["files"]
    wanted = {"trainer state": re.compile(re.escape(TRAINER_STATE)), "weights": WEIGHTS,
              "optimizer state": OPTIMIZER, "scheduler state": SCHEDULER}  # fmt: skip
    for what, pattern in wanted.items():
        if not any(pattern.fullmatch(name) for name in files):
            return f"it holds no {what}"
    for name in rng_files(manifest["ranks"], manifest["processes"]):
        if name not in files:
            return f"it holds no random state ({name})"
    return None


def rng_files(ranks: list[int], processes: int) -> list[str]:
    """The files in which transformers keeps the random state of these ranks."""
    return ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in ranks]


def _damaged_file(path: Path, manifest: dict) -> str | None:
    for name, about in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != about["size"]:
            return f"{name} is damaged: {size:,} bytes instead of {about['size']:,}"
        if hash_file(file) != about["sha256"]:
            return f"{name} is damaged: its hash is another"
    return None


def _replace(scratch: Path, target: Path) -> None:
    """Rename onto ``target``; what stands there already is moved out of the way first."""
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    scratch.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_manifest(path: Path, content: dict) -> None:
    digest = hashlib.sha256(_canonical(content)).hexdigest()
    with path.open("w", encoding="utf-8") as out:
        json.dump({"sha256": digest, "content": content}, out, ensure_ascii=False, indent=1)
        out.flush()
        os.fsync(out.fileno())


def _canonical(content: dict) -> bytes:
    return json.dumps(content, sort_keys=True, ensure_ascii=True).encode()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _sync(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
