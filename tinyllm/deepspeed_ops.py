"""DeepSpeed without its compiler: what can be left uncompiled is, the rest is announced.

On a CPU DeepSpeed compiles a shared-memory exchange at its first start (a minute, and a C++
compiler); gloo does the same work.  With an "optimizer" in its configuration it compiles an Adam of
its own; the configurations in ``configs/`` have none, so that PyTorch's AdamW is used.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from tinyllm.errors import UserError

SHARED_MEMORY_EXCHANGE = "deepspeed_shm_comm"
QUIET_SECONDS = 600  # a compilation writes something more often than that


def avoid_compiling(config: dict) -> list[str]:
    """Turn off what need not be compiled; returns notes about what must be.

    Args:
        config: DeepSpeed's configuration.

    Raises:
        UserError: something must be compiled, and there is no compiler.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__[SHARED_MEMORY_EXCHANGE] = False
    needed = compiled_optimizer(config)
    if needed is None:
        return []
    if shutil.which("c++") is None and shutil.which("g++") is None:
        raise UserError(
            f"DeepSpeed must compile {needed} for this configuration, and there is no C++ compiler; "
            "use a configuration of configs/, which compiles nothing"
        )
    notes = [f"DeepSpeed compiles {needed} at its first start, which takes about two minutes"]
    return notes + clear_locks(extensions_folder())


def compiled_optimizer(config: dict) -> str | None:
    """Name of DeepSpeed's own optimizer that a configuration asks for, None for PyTorch's."""
    name = config.get("optimizer", {}).get("type")
    if name:
        return f"its optimizer {name}"
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    if offload != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        return "its optimizer for offloading"
    return None


def extensions_folder() -> Path:
    """Where PyTorch keeps compiled extensions."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def clear_locks(folder: Path) -> list[str]:
    """Remove locks that an interrupted compilation left; name those that may be alive.

    PyTorch waits for a ``lock`` file without end, and a killed process does not remove it.
    """
    notes = []
    for lock in sorted(folder.glob("**/lock")):
        newest = max(path.stat().st_mtime for path in [lock, *lock.parent.iterdir()])
        if time.time() - newest > QUIET_SECONDS:
            lock.unlink(missing_ok=True)
            notes.append(f"removed {lock}, left by an interrupted compilation")
        else:
            notes.append(f"waiting for another compilation; if there is none, delete {lock}")
    return notes
