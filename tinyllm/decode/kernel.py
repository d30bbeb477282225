"""Compiles ``row.c`` with the machine's own C compiler, once, and keeps the result.

Without a compiler everything still works, by torch calls alone (``llama.py``), slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("row.c")
PARTS = (SOURCE, SOURCE.with_name("row_math.h"))
# Sums may be reordered (that is what vector registers do), nothing else of -ffast-math.
FLAGS = ["-O3", "-march=native", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math",
         "-fno-math-errno", "-shared", "-fPIC", "-std=gnu11", "-Wno-psabi"]  # fmt: skip
SECONDS_TO_COMPILE = 60


class Linear(ctypes.Structure):
    """``Linear`` of ``row.c``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "a", "b")),
        *((name, ctypes.c_int32) for name in ("in_", "out", "rank", "half")),
        ("scale", ctypes.c_float),
    ]


class Layer(ctypes.Structure):
    """``Layer`` of ``row.c``."""

    _fields_ = [
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        *((name, Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    ]


class Model(ctypes.Structure):
    """``Model`` of ``row.c``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("embedding", "norm", "cos", "sin", "layers", "scratch")),
        ("head", Linear),
        *((name, ctypes.c_int32) for name in
          ("num_layers", "hidden", "inner", "heads", "kv_heads", "dim", "context", "threads")),
        ("eps", ctypes.c_float),
    ]  # fmt: skip


def compiled() -> Path | None:
    """The shared library, compiled now if it is not there yet; None where that does not work."""
    compiler = (
        os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    )
    if compiler is None or platform.system() == "Windows":
        return None
    target = cache_folder() / f"row-{_identity(compiler)}.so"
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            if not any(_compile(compiler, made, more) for more in (["-fopenmp"], [])):
                return None
            made.replace(target)
    except OSError:
        return None
    return target


def _compile(compiler: str, made: Path, more: list[str]) -> bool:
    """Whether the compiler made it; without OpenMP, one thread does everything."""
    try:
        subprocess.run(
            [*compiler.split(), *FLAGS, *more, "-o", str(made), str(SOURCE), "-lm"], check=True,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS_TO_COMPILE,
            start_new_session=True,  # a Ctrl-C is for the chat
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def load() -> ctypes.CDLL | None:
    """The library, ready to call; None where it cannot be had."""
    path = compiled()
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    library.lanes.restype = ctypes.c_int32
    library.scratch_size.argtypes = [ctypes.POINTER(Model)]
    library.scratch_size.restype = ctypes.c_int64
    library.forward.argtypes = [
        ctypes.POINTER(Model), ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p,
    ]  # fmt: skip
    library.forward.restype = None
    return library


def cache_folder() -> Path:
    """Where compiled code is kept: the user's cache, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyllm"


def _identity(compiler: str) -> str:
    """Changes with everything the result depends on: source, flags, compiler and processor."""
    processor = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        processor += next((s for s in lines if s.startswith(("flags", "Features"))), "")
    parts = [*(part.read_text(encoding="utf-8") for part in PARTS), *FLAGS, compiler, processor]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
