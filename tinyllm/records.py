"""Files → records: conversations that know the file and line they came from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tinyllm.errors import UserError
from tinyllm.formats import RowError, conversation_of

SUFFIXES = (".jsonl", ".json")
SHOWN_BAD_ROWS = 10


@dataclass(frozen=True)
class Record:
    """A conversation and its origin; ``line`` counts from 1 (for .json: the element's number)."""

    messages: list[dict]
    file: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass
class FileCount:
    """What became of the rows of one file."""

    file: str
    num_read: int = 0
    num_kept: int = 0
    refused: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class Records:
    """All records of some files, and what became of every row."""

    records: list[Record]
    files: list[FileCount]

    @property
    def refused(self) -> list[str]:
        return [f"{f.file}:{line}: {why}" for f in self.files for line, why in f.refused]


def read_records(paths: list[str], bad_rows: str = "error") -> Records:
    """Read every row of the given files and folders.

    Args:
        paths: files, or folders (every data file in them, in the order of their names).
        bad_rows: ``error`` stops at rows that cannot be used, ``skip`` counts and lists them.

    Raises:
        UserError: a missing, empty or undecodable file; a bad row under ``error``.
    """
    result = Records([], [])
    for path in _data_files(paths):
        count = FileCount(str(path))
        result.files.append(count)
        for line, row in _rows(path):
            count.num_read += 1
            try:
                result.records.append(Record(_conversation(row), str(path), line))
                count.num_kept += 1
            except RowError as error:
                count.refused.append((line, str(error)))
        if not count.num_read:
            raise UserError(f"{path}: the file has no rows")
    if result.refused and bad_rows == "error":
        raise UserError(_bad_rows_message(result.refused))
    if not result.records:
        raise UserError(f"{', '.join(paths)}: no row can be used; first: {result.refused[0]}")
    return result


def _bad_rows_message(refused: list[str]) -> str:
    shown = "\n  ".join(refused[:SHOWN_BAD_ROWS])
    more = len(refused) - SHOWN_BAD_ROWS
    rest = f"\n  ... and {more} more" if more > 0 else ""
    rows = "row" if len(refused) == 1 else "rows"
    return f"{len(refused)} {rows} cannot be used (mend them, or --bad_rows skip):\n  {shown}{rest}"


def _data_files(paths: list[str]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
            if not inside:
                raise UserError(f"{path}: the folder holds no {' or '.join(SUFFIXES)} file")
            files += inside
        elif not path.exists():
            raise UserError(f"{path}: no such data file or folder")
        elif path.suffix not in SUFFIXES:
            raise UserError(f"{path}: cannot read {path.suffix or 'a file without ending'} files; "
                            f"expected {' or '.join(SUFFIXES)}")  # fmt: skip
        else:
            files.append(path)
    return files


def _rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield ``(line, row)``; a row that is not JSON is yielded as the RowError that says why."""
    try:
        if path.suffix == ".json":
            yield from _json_elements(path)
        else:
            with path.open("rb") as lines:
                yield from _json_lines(path, lines)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def _json_lines(path: Path, lines) -> Iterator[tuple[int, object]]:
    for number, raw in enumerate(lines, 1):
        text = _decode(path, number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)
        if text.strip():
            yield number, _parse(text)


def _json_elements(path: Path) -> Iterator[tuple[int, object]]:
    text = _decode(path, None, path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    if not text.strip():
        return
    content = _parse(text)
    if isinstance(content, RowError):
        raise UserError(f"{path}: {content}")
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of rows; a file of single rows is .jsonl")
    yield from enumerate(content, 1)


def _decode(path: Path, number: int | None, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{path}:{number}" if number else str(path)
        raise UserError(
            f"{where}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8"
        ) from error


def _parse(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return RowError(f"not JSON: {error.msg} at character {error.pos + 1}")
    except RecursionError:
        return RowError("not JSON that can be read: nested too deeply")
    except ValueError as error:  # e.g. an integer of more than 4,300 digits
        return RowError(f"not JSON that can be read: {error}")


def _conversation(row: object) -> list[dict]:
    if isinstance(row, RowError):
        raise row
    return conversation_of(row)
