"""Compiles C code with the machine's own compiler, once, and keeps the result.

Everything that uses it also works without a compiler, by torch calls alone, slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

# Sums may be reordered (that is what vector registers do), nothing else of -ffast-math.
FLAGS = ["-O3", "-march=native", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math",
         "-fno-math-errno", "-shared", "-fPIC", "-std=gnu11", "-Wno-psabi"]  # fmt: skip
SECONDS_TO_COMPILE = 60


def headers_of(source: Path, *names: str) -> list[Path]:
    """The headers of a C file, all that it includes, in its folder."""
    return [source.with_name(f"{name}.h") for name in names]


def functions_of(
    source: Path, headers: Iterable[Path], arguments: dict[str, list]
) -> ctypes.CDLL | None:
    """The library of a C file with these functions, none of which returns anything.

    Returns:
        None where it cannot be had, or where the file has nothing for this processor, which it says by a
        function ``multiplies_pairs``.
    """
    found = load(source, *headers)
    if found is None or (hasattr(found, "multiplies_pairs") and not found.multiplies_pairs()):
        return None
    for name, types in arguments.items():
        function = getattr(found, name)
        function.argtypes, function.restype = types, None
    return found


def load(source: Path, *headers: Path) -> ctypes.CDLL | None:
    """The library of one C file and the headers it includes; None where it cannot be had."""
    path = compiled(source, *headers)
    if path is None:
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def compiled(source: Path, *headers: Path) -> Path | None:
    """The shared library, compiled now if it is not there yet; None where that does not work."""
    compiler = (
        os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    )
    if compiler is None or platform.system() == "Windows":
        return None
    try:
        target = cache_folder() / f"{source.stem}-{_identity(compiler, [source, *headers])}.so"
        if target.is_file():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            if not any(_compile(compiler, source, made, more) for more in (["-fopenmp"], [])):
                return None
            made.replace(target)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    return target


def _compile(compiler: str, source: Path, made: Path, more: list[str]) -> bool:
    """Whether the compiler made it; without OpenMP, one thread does everything."""
    try:
        subprocess.run(
            [*compiler.split(), *FLAGS, *more, "-o", str(made), str(source), "-lm"], check=True,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS_TO_COMPILE,
            start_new_session=True,  # a Ctrl-C is for the chat
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def cache_folder() -> Path:
    """Where compiled code is kept: the user's cache, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyllm"


def _identity(compiler: str, files: list[Path]) -> str:
    """Changes with everything the result depends on: source, flags, compiler and processor."""
    processor = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        processor += next((s for s in lines if s.startswith(("flags", "Features"))), "")
    parts = [*(file.read_text(encoding="utf-8") for file in files), *FLAGS, compiler, processor]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
