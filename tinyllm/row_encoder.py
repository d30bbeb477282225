"""The second reading: rows → examples, each row's fate carried out and entered in the ledger."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tinyllm.encoding import Encoder, Outcome
from tinyllm.errors import UserError
from tinyllm.examples import Examples, ExampleWriter
from tinyllm.formats import RowRules
from tinyllm.ledger import FileLedger, PartLedger
from tinyllm.printable import printable
from tinyllm.progress_bar import counted
from tinyllm.records import Record, bad_rows_message
from tinyllm.row_index import HELD_OUT, RowIndex
from tinyllm.settings import MAX_SAMPLE_REPLIES


class RowEncoder:
    """Encodes indexed rows into training and held-out examples.

    Args:
        bad_rows: ``error`` stops when the encoder refuses a row, ``skip`` lists it in the ledger.
        folder: where to write the examples; None for memory.

    Attributes:
        sizes: of the training and of the held-out examples, once finished.
        samples: the first held-out records, or training records when none is held out.
    """

    def __init__(
        self, encoder: Encoder, rules: RowRules, bad_rows: str, folder: Path | None, progress: bool
    ) -> None:
        self.encoder, self.rules, self.bad_rows, self.progress = encoder, rules, bad_rows, progress
        self.train, self.held_out = (
            ExampleWriter(folder, "train"),
            ExampleWriter(folder, "held_out"),
        )
        self.first: dict[bool, list[Record]] = {True: [], False: []}
        self.sizes: tuple[PartLedger | None, PartLedger | None] = (None, None)

    @property
    def samples(self) -> list[Record]:
        return self.first[True] or self.first[False]

    def encode(self, index: RowIndex, fates: np.ndarray) -> None:
        """Encode all rows of an index.

        Args:
            fates: ``(num_rows,)``: HELD_OUT, or how often an epoch sees the row.

        Raises:
            UserError: a row the encoder refuses, or one that is too long, when that is an error.
        """
        rows = np.flatnonzero(fates)
        for file, number in enumerate(np.bincount(np.asarray(index.file)[fates == 0])):
            index.ledgers[file].num_left_out = int(number)
        chosen = (r for r, fate in zip(index.records(self.rules), fates, strict=True) if fate)
        with counted("encoding", len(rows), self.progress) as count:
            for row, (record, outcome) in zip(rows, self.encoder.encode_all(chosen), strict=True):
                self._enter(index.ledgers[index.file[row]], record, outcome, int(fates[row]))
                count(1)
        self._stop_at_errors(index.ledgers)

    def _enter(self, ledger: FileLedger, record: Record, outcome: Outcome, fate: int) -> None:
        if outcome.refused:
            ledger.refused.append((record.line, printable(outcome.refused)))
            return
        if outcome.ids is None:
            ledger.dropped.append((record.line, outcome.num_tokens))
            return
        ledger.num_kept += 1
        if outcome.shortened:
            ledger.shortened.append((record.line, outcome.num_tokens))
        held_out = fate == HELD_OUT
        if held_out:
            self.held_out.append(outcome.ids, outcome.labels)
            ledger.num_held_out += 1
        else:
            self.train.append(outcome.ids, outcome.labels, fate)
            ledger.num_examples += fate
        if len(self.first[held_out]) < MAX_SAMPLE_REPLIES:
            self.first[held_out].append(record)

    def _stop_at_errors(self, ledgers: list[FileLedger]) -> None:
        if self.bad_rows == "error" and any(ledger.refused for ledger in ledgers):
            raise UserError(bad_rows_message(ledgers))
        long = [
            (size, f"{ledger.file}:{line}") for ledger in ledgers for line, size in ledger.dropped
        ]
        if long and self.encoder.rules.overlong == "error":
            size, where = max(long)
            rows = "row gives an example" if len(long) == 1 else "rows give examples"
            raise UserError(
                f"{len(long):,} {rows} longer than --max_length {self.encoder.rules.max_length}, "
                f"first {long[0][1]}, longest {where} with {size:,} tokens; "
                "raise it, or choose --overlong drop or shorten"
            )

    def finish(self) -> tuple[Examples, Examples | None]:
        """The training and the held-out examples.

        Raises:
            UserError: there is nothing to train on.
        """
        train, held_out = self.train.finish(), self.held_out.finish()
        if train is None:
            raise UserError(
                "no training example is left: every row was refused, is longer than --max_length "
                f"{self.encoder.rules.max_length}, or is held out"
            )
        self.sizes = (
            PartLedger.of(train.lengths, self.train.num_supervised),
            PartLedger.of(held_out.lengths, self.held_out.num_supervised) if held_out else None,
        )
        return train, held_out

    def close(self) -> None:
        """Close files that are still open."""
        self.train.close()
        self.held_out.close()
