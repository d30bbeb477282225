"""Encoded examples, in memory or memory-mapped from a cache folder.

Example (ids shortened):  question "你好", answer "好" →
    input_ids  [2, 10, 700, 10, 3, 10, 650, 10, 4, 10, 651, 1]
    labels     [-100 × 10,                           651, 1]
"""

from __future__ import annotations

import hashlib
import io
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from tinyllm.chat_format import IGNORE_INDEX
from tinyllm.encoding import Encoder, LengthRules
from tinyllm.errors import UserError
from tinyllm.printable import printable
from tinyllm.records import Record

ARRAYS = {"input_ids": np.int32, "labels": np.int32, "offsets": np.int64}
HASH_CHUNK = 2**20


class Examples(Dataset):
    """Encoded examples behind each other in two flat arrays.

    Attributes:
        input_ids: ids of all examples, ``(N,)`` int32.
        labels: targets of all examples, ``(N,)`` int32, ``IGNORE_INDEX`` where nothing is learned.
        offsets: example ``i`` is ``[offsets[i], offsets[i + 1])``, ``(num_examples + 1,)`` int64.
    """

    def __init__(
        self, input_ids: np.ndarray, labels: np.ndarray, offsets: np.ndarray, digest: str = ""
    ) -> None:
        self.input_ids, self.labels, self.offsets = input_ids, labels, offsets
        self._digest = digest

    @classmethod
    def from_lists(cls, encoded: list[tuple[list[int], list[int]]]) -> Examples:
        """From ``(input_ids, labels)`` of each example."""
        writer = ExampleWriter()
        for ids, labels in encoded:
            writer.append(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32))
        return writer.finish()

    @classmethod
    def open(cls, folder: Path, name: str) -> Examples:
        """Map examples from the files that :class:`ExampleWriter` left, without loading them.

        Raises:
            OSError, ValueError: the files are missing or cannot be mapped.
        """
        digest = hashlib.sha256()
        arrays = []
        for part, dtype in ARRAYS.items():
            path = folder / f"{name}.{part}"
            with path.open("rb") as file:  # not through the map: that would make all of it resident
                while chunk := file.read(HASH_CHUNK):
                    digest.update(chunk)
            # a plain view, since slicing a np.memmap takes many times longer
            arrays.append(np.asarray(np.memmap(path, dtype=dtype, mode="r")))
        return cls(*arrays, digest=digest.hexdigest())

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One example: ``input_ids`` and ``labels``, each ``(T,)``."""
        start, end = self.offsets[index], self.offsets[index + 1]
        return {"input_ids": self.input_ids[start:end], "labels": self.labels[start:end]}

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def num_supervised(self) -> int:
        # in pieces: a mask over a whole memory-mapped array would be an array of its own
        return sum(
            int(np.count_nonzero(self.labels[start : start + HASH_CHUNK] != IGNORE_INDEX))
            for start in range(0, len(self.labels), HASH_CHUNK)
        )

    @property
    def digest(self) -> str:
        """Hash of everything that training sees of the data."""
        if not self._digest:
            digest = hashlib.sha256()
            for part in (self.input_ids, self.labels, self.offsets):
                digest.update(np.ascontiguousarray(part))
            self._digest = digest.hexdigest()
        return self._digest


class ExampleWriter:
    """Collects examples one by one, in memory or, given a folder, in files of that folder.

    Args:
        folder: where to write ``NAME.input_ids``, ``NAME.labels`` and ``NAME.offsets``.
        name: what the examples are, ``train`` or ``held_out``.
    """

    def __init__(self, folder: Path | None = None, name: str = "") -> None:
        self.folder, self.name = folder, name
        self.files = {part: (folder / f"{name}.{part}").open("wb") if folder else io.BytesIO()
                      for part in ARRAYS}  # fmt: skip
        self.lengths, self.num_supervised = array("q"), 0

    def __len__(self) -> int:
        return len(self.lengths)

    def append(self, ids: np.ndarray, labels: np.ndarray, copies: int = 1) -> None:
        """Add one example, ids and labels ``(T,)`` int32, as often as it is to be seen."""
        for _ in range(copies):
            self.files["input_ids"].write(ids.tobytes())
            self.files["labels"].write(labels.tobytes())
            self.lengths.append(len(ids))
            self.num_supervised += int(np.count_nonzero(labels != IGNORE_INDEX))

    def finish(self) -> Examples | None:
        """The examples that were added, None if there was none."""
        offsets = np.concatenate([[0], np.cumsum(np.asarray(self.lengths))]).astype(np.int64)
        self.files["offsets"].write(offsets.tobytes())
        if not self.folder:
            parts = (np.frombuffer(self.files[p].getbuffer(), dtype=t) for p, t in ARRAYS.items())
            return Examples(*parts) if len(self) else None
        self.close()
        return Examples.open(self.folder, self.name) if len(self) else None

    def close(self) -> None:
        """Close the files."""
        if self.folder:
            for file in self.files.values():
                file.close()


@dataclass
class EncodingCount:
    """What became of the records when they were encoded; places as ``file:line``."""

    num_examples: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    shortened: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def encode_records(
    records: Iterable[Record], chat_format, system_prompt: str, max_length: int, overlong: str
) -> tuple[Examples, EncodingCount]:
    """Encode records that are already there, into memory.

    Args:
        chat_format: what :func:`tinyllm.chat_format.chat_format_of` gives.
        system_prompt: put before conversations that bring none.
        max_length: most tokens of one example.
        overlong: ``error``, ``drop`` or ``shorten``, for examples over ``max_length``.

    Raises:
        UserError: a record that cannot be used; one over ``max_length`` under ``error``; no
            example is left.
    """
    encoder = Encoder(chat_format, system_prompt, LengthRules(max_length, overlong))
    writer, count = ExampleWriter(), EncodingCount()
    for record, outcome in encoder.encode_all(records):
        if outcome.refused:
            raise UserError(f"{record.where}: {printable(outcome.refused)}")
        if outcome.ids is not None:
            writer.append(outcome.ids, outcome.labels)
            count.shortened += [record.where] * outcome.shortened
        elif overlong == "error":
            raise UserError(
                f"{record.where}: the example has {outcome.num_tokens} tokens, --max_length is "
                f"{max_length}; raise it, or choose --overlong drop or shorten"
            )
        else:
            count.dropped.append(record.where)
    examples = writer.finish()
    if examples is None:
        raise UserError(f"no example is left: every one is longer than --max_length {max_length}")
    count.num_examples, count.num_tokens = len(examples), len(examples.input_ids)
    count.num_supervised = writer.num_supervised
    return examples, count
