"""What can go wrong while a run is under way → one line that says what, where and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from tinyllm.errors import Interrupted, UserError

STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG,
           errno.EIO, errno.ESTALE)  # fmt: skip
# torch and safetensors write in C++ and Rust, and tell of a full disk in words of their own.
TORCH_WRITER = re.compile(r"PytorchStreamWriter failed|file write failed|inline_container")
OS_ERROR = re.compile(r"os error (\d+)")
NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|bad_alloc", re.I)
OTHER_RANK = re.compile(
    r"Connection (closed|reset) by peer|NCCL|gloo|Broken pipe|socket|DistBackend|Timed out waiting",
    re.I,
)
LOST_PROCESS = "another process of this run has ended, see its message"


def storage_problem(error: BaseException) -> str | None:
    """Why something could not be written, None when the error is of another kind."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in STORAGE:
            return os.strerror(seen.errno)
        if match := OS_ERROR.search(str(seen)):
            return os.strerror(int(match[1]))
        if TORCH_WRITER.search(str(seen)):
            return "the disk is full, or the file may not grow"
        seen = seen.__cause__ or seen.__context__
    return None


def memory_problem(error: BaseException) -> bool:
    """Whether memory has run out, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def lost_process(error: BaseException) -> bool:
    """Whether an exchange with the other processes failed: one of them has gone."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and isinstance(error, RuntimeError) and bool(OTHER_RANK.search(str(error)))


@contextlib.contextmanager
def one_line_for_faults(folder: Path, settings, stop) -> Iterator[None]:
    """Turn faults of the machine into a :class:`UserError`; others keep their traceback.

    Args:
        folder: the run folder.
        settings: TrainingArguments, whose numbers are named.
        stop: the watcher of signals; an exchange that fails after a signal is no fault.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if lost_process(error) and stop.wanted:
            raise Interrupted(stop.signal, "while another process ended") from error
        if (line := _line_for(error, folder, settings)) is None:
            raise
        raise UserError(line) from error


def _line_for(error: Exception, folder: Path, settings) -> str | None:
    if memory_problem(error):
        return (
            "out of memory: lower MBS (--per_device_train_batch_size, now "
            f"{settings.per_device_train_batch_size}) and raise GAS by the same factor, or lower "
            f"--max_length, or add --gradient_checkpointing True; {go_on(folder)}"
        )
    if isinstance(error, pickle.UnpicklingError):
        return f"{folder}: a file of the checkpoint holds more than tensors, and is not opened"
    if reason := storage_problem(error):
        name = getattr(error, "filename", None)
        return f"{name or folder}: cannot be written: {reason}; {go_on(folder)}"
    if lost_process(error):
        return f"{LOST_PROCESS}; {go_on(folder)}"
    return None


def go_on(folder: Path) -> str:
    """What is safe, and how to go on."""
    from tinyllm.checkpoint import find

    found = find(folder)
    if not found:
        return "there is no checkpoint yet; mend this, and run the same command again"
    return f"{found[0].path.name} is intact; mend this, and run the same command again to go on"
