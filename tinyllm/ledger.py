"""The ledger: what became of every row; all of it goes into ``data_report.json``.

Of each file:  read = kept + refused + dropped (+ left out, when its weight is below 1).
Shortened and duplicate rows are among the kept ones.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np

from tinyllm.printable import one_line

LISTED = 100
MAX_COLUMN_NAMES = 20


@dataclass
class FileLedger:
    """What became of the rows of one file.

    Attributes:
        part: ``train``, or ``held-out`` for a file that is only evaluated on.
        num_left_out: rows that a weight below 1 leaves out.
        num_held_out: kept rows that are evaluated on instead of trained on.
        num_examples: training examples an epoch sees: kept rows times the weight.
        num_duplicates: kept rows that repeat an earlier one word for word.
        refused: line and reason.
        shortened: line, and the tokens it had.
        dropped: line, and the tokens it had.
        unused_columns: names in its rows that nothing reads.
        mapped_columns: those that ``--columns`` names.
    """

    file: str
    part: str = "train"
    weight: float = 1.0
    num_read: int = 0
    num_kept: int = 0
    num_left_out: int = 0
    num_held_out: int = 0
    num_examples: int = 0
    num_duplicates: int = 0
    refused: list[tuple[int, str]] = field(default_factory=list)
    shortened: list[tuple[int, int]] = field(default_factory=list)
    dropped: list[tuple[int, int]] = field(default_factory=list)
    unused_columns: list[str] = field(default_factory=list)
    mapped_columns: list[str] = field(default_factory=list)

    def note_columns(self, unused: set[str], mapped: frozenset[str] | set[str]) -> None:
        """Remember names of a row's columns; of those that nothing reads as many as fit on a line."""
        full = len(self.unused_columns) == MAX_COLUMN_NAMES
        if unused and not full and not unused.issubset(self.unused_columns):
            names = {*self.unused_columns, *(one_line(name, 40) for name in unused)}
            self.unused_columns = sorted(names)[:MAX_COLUMN_NAMES]
        if mapped and not mapped.issubset(self.mapped_columns):
            self.mapped_columns = sorted({*self.mapped_columns, *mapped})


@dataclass
class PartLedger:
    """Sizes of the training or of the held-out examples, lengths in tokens."""

    num_examples: int
    num_tokens: int
    num_supervised: int
    length_median: int
    length_p95: int
    length_max: int

    @classmethod
    def of(cls, lengths: np.ndarray, num_supervised: int) -> PartLedger:
        """From the examples' lengths ``(num_examples,)``."""
        median, p95, longest = np.percentile(lengths, [50, 95, 100], method="higher").astype(int)
        return cls(
            len(lengths), int(lengths.sum()), num_supervised, int(median), int(p95), int(longest)
        )

    @property
    def line(self) -> str:
        return (
            f"{self.num_examples:,} examples, {self.num_tokens:,} tokens, "
            f"{self.num_supervised / self.num_tokens:.0%} of them learned; length median "
            f"{self.length_median}, p95 {self.length_p95}, max {self.length_max}"
        )


@dataclass
class Repeats:
    """How often something was met again: the number, and where, for the first few."""

    number: int = 0
    first: list[str] = field(default_factory=list)


@dataclass
class Ledger:
    """Everything that is known about the data of a run.

    Attributes:
        duplicates: rows that repeat an earlier one word for word.
        conflicts: questions that have several different answers.
        overlap: held-out rows whose question is also trained on.
        other_files: what else lies in the data folders and was not read.
    """

    files: list[FileLedger]
    max_length: int
    train: PartLedger | None = None
    held_out: PartLedger | None = None
    duplicates: Repeats = field(default_factory=Repeats)
    conflicts: Repeats = field(default_factory=Repeats)
    overlap: Repeats = field(default_factory=Repeats)
    other_files: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, content: dict) -> Ledger:
        """The inverse of :meth:`to_json`."""
        content = dict(content)
        files = [FileLedger(**{**file, **_pairs(file)}) for file in content.pop("files")]
        parts = {name: PartLedger(**content.pop(name)) if content[name] else content.pop(name)
                 for name in ("train", "held_out")}  # fmt: skip
        repeats = {n: Repeats(**content.pop(n)) for n in ("duplicates", "conflicts", "overlap")}
        return cls(files=files, **parts, **repeats, **content)

    def to_json(self) -> dict:
        """Plain dicts and lists."""
        return asdict(self)

    def total(self, name: str) -> int:
        """Sum of a count, or of the length of a list, over all files."""
        return total(self.files, name)

    def report(self) -> dict:
        """Content of ``data_report.json``: every refused, shortened and dropped row by its line."""
        content = self.to_json()
        for file in content["files"]:
            file["refused"] = [{"line": line, "reason": why} for line, why in file["refused"]]
            for name in ("shortened", "dropped"):
                file[name] = [{"line": line, "num_tokens": size} for line, size in file[name]]
            file["num_refused"], file["num_dropped"] = len(file["refused"]), len(file["dropped"])
            file["num_shortened"] = len(file["shortened"])
        return content


def total(files: list[FileLedger], name: str) -> int:
    """Sum of a count, or of the length of a list."""
    values = [getattr(file, name) for file in files]
    return sum(value if isinstance(value, int) else len(value) for value in values)


def _pairs(file: dict) -> dict:
    return {
        name: [tuple(pair) for pair in file[name]] for name in ("refused", "shortened", "dropped")
    }
