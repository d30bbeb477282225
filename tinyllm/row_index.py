"""The first reading: every row is checked and remembered by two hashes, before any is encoded.

A million rows take some 30 MB here.  From the index follows what becomes of each row: trained on
once or several times, held out, or left out by a weight below 1.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from tinyllm.errors import UserError
from tinyllm.formats import RowRules
from tinyllm.ledger import LISTED, FileLedger, Repeats
from tinyllm.printable import one_line
from tinyllm.progress_bar import counted
from tinyllm.records import Record, Source, bad_rows_message, read_records

HELD_OUT = -1


@dataclass
class RowIndex:
    """All usable rows of some files, in order; ``num_rows`` entries in each array.

    Attributes:
        sources: the files.
        ledgers: what became of each file's rows so far.
        file: which file a row is from.
        line: its line there.
        question: hash of everything before its last answer.
        whole: hash of the whole conversation.
    """

    sources: list[Source]
    ledgers: list[FileLedger]
    file: array = field(default_factory=lambda: array("i"))
    line: array = field(default_factory=lambda: array("q"))
    question: array = field(default_factory=lambda: array("q"))
    whole: array = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        return len(self.line)

    def where(self, row: int) -> str:
        """``file:line`` of a row."""
        return f"{self.ledgers[self.file[row]].file}:{self.line[row]}"

    def append(self, file: int, record: Record) -> None:
        """Remember a row."""
        turns = [(message["role"], message["content"]) for message in record.messages]
        question = hash(tuple(turns[:-1]))
        self.file.append(file)
        self.line.append(record.line)
        self.question.append(question)
        self.whole.append(hash((question, turns[-1])))

    def records(self, rules: RowRules) -> Iterator[Record]:
        """Read the files again and yield the same rows in the same order.

        Raises:
            UserError: a file has changed in between.
        """
        number = 0
        for file, source in enumerate(self.sources):
            for record in read_records(source.path, rules, FileLedger(self.ledgers[file].file)):
                if number >= len(self) or self.line[number] != record.line:
                    raise UserError(f"{record.where}: the file has changed while it was being read")
                yield record
                number += 1
        if number < len(self):
            raise UserError(f"{self.where(number)}: the file has changed while it was being read")


def index_rows(
    sources: list[Source], rules: RowRules, part: str, bad_rows: str, progress: bool = False
) -> RowIndex:
    """Read and check every row.

    Args:
        part: what the rows are for, ``train`` or ``held-out``.
        bad_rows: ``error`` stops at rows that cannot be used, ``skip`` counts and lists them.

    Raises:
        UserError: a file that cannot be read, a refused row under ``error``, no usable row.
    """
    index = RowIndex(sources, [FileLedger(one_line(s.path), part, s.weight) for s in sources])
    with counted("checking rows", None, progress) as count:
        for number, source in enumerate(sources):
            for record in read_records(source.path, rules, index.ledgers[number]):
                index.append(number, record)
                count(1)
    _require_columns(index, rules)
    if bad_rows == "error" and any(ledger.refused for ledger in index.ledgers):
        raise UserError(bad_rows_message(index.ledgers))
    if not len(index):
        first = bad_rows_message(index.ledgers).split("\n")[1].strip()
        files = ", ".join(ledger.file for ledger in index.ledgers)
        raise UserError(f"{files}: no row can be used; first: {first}")
    return index


def _require_columns(index: RowIndex, rules: RowRules) -> None:
    found = {name for ledger in index.ledgers for name in ledger.mapped_columns}
    missing = sorted(set(rules.columns.values()) - found)
    if missing and all(ledger.part == "train" for ledger in index.ledgers):
        raise UserError(f"--columns: no row has a column {one_line(missing[0], 60)!r}")


def hold_out(index: RowIndex, share: float, seed: int) -> np.ndarray:
    """Choose a share of the rows at random, rows with the same question all or none.

    Returns:
        Whether each row is held out, ``(num_rows,)``; at least one is, if there are two questions.
    """
    _, group = np.unique(np.asarray(index.question), return_inverse=True)
    first_rows = np.sort(np.unique(group, return_index=True)[1])
    num_questions = len(first_rows)
    if num_questions < 2:
        return np.zeros(len(index), dtype=bool)
    number = min(max(1, round(num_questions * share)), num_questions - 1)
    chosen = random.Random(seed).sample(range(num_questions), number)
    return np.isin(group, group[first_rows[sorted(chosen)]])


def copies(index: RowIndex, seed: int) -> np.ndarray:
    """How often an epoch sees each row, ``(num_rows,)``: its file's weight, rounded at random.

    The seed and the places of file and row decide, so the same rows come every time.
    """
    file = np.asarray(index.file)
    number = np.zeros(len(index), dtype=np.int64)
    for place, source in enumerate(index.sources):
        rows = np.flatnonzero(file == place)
        draws = np.random.default_rng((abs(seed), place)).random(len(rows))
        whole = int(source.weight)
        number[rows] = whole + (draws < source.weight - whole)
    return number


def count_repeats(index: RowIndex) -> tuple[Repeats, Repeats]:
    """``(duplicates, conflicts)`` among the rows; duplicates are also counted in their files."""
    whole, question = np.asarray(index.whole), np.asarray(index.question)
    _, first, group = np.unique(whole, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[group] != np.arange(len(whole)))
    for file, number in enumerate(np.bincount(np.asarray(index.file)[again])):
        index.ledgers[file].num_duplicates += int(number)
    duplicates = [
        f"{index.where(row)} repeats {index.where(first[group[row]])}" for row in again[:LISTED]
    ]
    distinct = np.sort(first)
    _, first_asked, asked, number = np.unique(
        question[distinct], return_index=True, return_inverse=True, return_counts=True
    )
    other = np.flatnonzero((number[asked] > 1) & (first_asked[asked] != np.arange(len(distinct))))
    conflicts = [
        f"{index.where(distinct[row])} answers otherwise than {index.where(distinct[first_asked[asked[row]]])}"
        for row in other[:LISTED]
    ]
    return Repeats(len(again), duplicates), Repeats(int((number > 1).sum()), conflicts)


def count_overlap(held_out: RowIndex, train: RowIndex) -> Repeats:
    """Held-out rows whose question is also among the training rows."""
    asked = np.flatnonzero(np.isin(np.asarray(held_out.question), np.asarray(train.question)))
    return Repeats(len(asked), [held_out.where(row) for row in asked[:LISTED]])
