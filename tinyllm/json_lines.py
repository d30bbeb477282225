"""Files of JSON lines that a run adds to, and that a kill may cut short at any byte."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path


def read_lines(path: Path) -> list[dict]:
    """The lines of a file, none where it is absent; one that a kill cut short is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def write_lines(path: Path, lines: list[dict]) -> None:
    """Replace a file by these lines, whole or not at all."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text("".join(map(_line, lines)), encoding="utf-8")
    scratch.replace(path)


def append_line(path: Path, content: dict) -> None:
    """Add one line; what was cut short before it keeps a line of its own."""
    with path.open("ab+") as out:
        if out.tell():
            out.seek(-1, 2)
            if out.read(1) != b"\n":
                out.write(b"\n")
        out.write(_line(content).encode())


def _line(content: dict) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"
