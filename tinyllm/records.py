"""Files → records: conversations that know the file and line they came from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tinyllm.errors import UserError
from tinyllm.formats import RowError, RowRules, conversation_of, unused_columns
from tinyllm.ledger import FileLedger
from tinyllm.printable import one_line
from tinyllm.readers import SUFFIXES, kind_of, read_rows

SHOWN_BAD_ROWS = 10
MAX_WEIGHT = 100


@dataclass(frozen=True)
class Record:
    """A conversation and its origin; ``line`` counts from 1 (.json, .parquet: the row's number)."""

    messages: list[dict]
    file: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Source:
    """A data file, and how often an epoch sees its rows: 2 is twice, 0.5 a half of them."""

    path: Path
    weight: float = 1.0


def split_weight(text: str) -> tuple[str, float]:
    """``"a.jsonl:2"`` → ``("a.jsonl", 2.0)``; without a number behind a colon the weight is 1.

    Raises:
        UserError: a weight that is no share and no multiple.
    """
    path, colon, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    if not colon or not path or Path(text).exists():
        return text, 1.0
    if not math.isfinite(weight) or not 0 < weight <= MAX_WEIGHT:
        raise UserError(f"--dataset {text}: the weight must be above 0 and at most {MAX_WEIGHT}")
    return path, weight


def find_sources(paths: list[str]) -> tuple[list[Source], list[str]]:
    """Find the data files behind paths with weights.

    Returns:
        The files, folders replaced by the data files in them in the order of their names; and the
        names of what else lies in those folders.

    Raises:
        UserError: a path is missing or holds no data.
    """
    sources: list[Source] = []
    others: list[str] = []
    for text in paths:
        name, weight = split_weight(text)
        try:
            files, beside = _data_files(Path(name))
        except OSError as error:
            raise UserError(f"{one_line(name)}: {error.strerror or error}") from error
        sources += [Source(file, weight) for file in files]
        others += beside
    return sources, others


def _data_files(path: Path) -> tuple[list[Path], list[str]]:
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{one_line(path)}: no such data file or folder")
        if not path.is_file():
            raise UserError(
                f"{one_line(path)}: no regular file; rows are read twice, so save them first"
            )
        kind_of(path)
        return [path], []
    inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    files = [p for p in inside if _is_data(p)]
    if not files:
        raise UserError(f"{one_line(path)}: the folder holds no {', '.join(SUFFIXES)} file")
    return files, [one_line(p) for p in inside if not _is_data(p)]


def _is_data(path: Path) -> bool:
    try:
        kind_of(path)
    except UserError:
        return False
    return path.is_file()


def read_records(path: Path, rules: RowRules, ledger: FileLedger) -> Iterator[Record]:
    """Yield the usable rows of a file; the ledger counts every row and lists the refused ones.

    Raises:
        UserError: the file cannot be read, or has no rows.
    """
    mapped = frozenset(rules.columns.values())
    for line, row in read_rows(path):
        ledger.num_read += 1
        if isinstance(row, dict):
            ledger.note_columns(unused_columns(row, mapped), mapped & row.keys())
        try:
            yield Record(_conversation(row, rules), ledger.file, line)
        except RowError as error:
            ledger.refused.append((line, str(error)))
    if not ledger.num_read:
        raise UserError(f"{ledger.file}: the file has no rows")


def _conversation(row: object, rules: RowRules) -> list[dict]:
    if isinstance(row, RowError):
        raise row
    try:
        return conversation_of(row, rules)
    except RecursionError:
        raise RowError("nested too deeply") from None


def bad_rows_message(files: list[FileLedger], more: str = "") -> str:
    """Say which rows were refused: how many, and the first ten of them."""
    refused = [f"{file.file}:{line}: {why}" for file in files for line, why in file.refused]
    shown = "\n  ".join(refused[:SHOWN_BAD_ROWS])
    rest = len(refused) - SHOWN_BAD_ROWS
    rest_line = f"\n  ... and {rest:,} more" if rest > 0 else ""
    rows = "row" if len(refused) == 1 else "rows"
    return (
        f"{len(refused):,} {rows} cannot be used{more} (mend them, or --bad_rows skip):\n"
        f"  {shown}{rest_line}"
    )
