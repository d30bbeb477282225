"""Records → encoded examples, and the count of what became of them.

Example (ids shortened):  question "你好", answer "好" →
    input_ids  [2, 10, 700, 10, 3, 10, 650, 10, 4, 10, 651, 1]
    labels     [-100 × 10,                           651, 1]
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import Dataset

from tinyllm.chat_format import IGNORE_INDEX, with_system_prompt
from tinyllm.errors import UserError
from tinyllm.records import Record


class Examples(Dataset):
    """Encoded examples behind each other in two flat arrays.

    Attributes:
        input_ids: ids of all examples, ``(N,)`` int32.
        labels: targets of all examples, ``(N,)`` int32, ``IGNORE_INDEX`` where nothing is learned.
        offsets: example ``i`` is ``[offsets[i], offsets[i + 1])``, ``(num_examples + 1,)`` int64.
    """

    def __init__(self, input_ids: np.ndarray, labels: np.ndarray, offsets: np.ndarray) -> None:
        self.input_ids, self.labels, self.offsets = input_ids, labels, offsets

    @classmethod
    def from_lists(cls, encoded: list[tuple[list[int], list[int]]]) -> Examples:
        lengths = [len(ids) for ids, _ in encoded]
        flat_ids = np.array([i for ids, _ in encoded for i in ids], dtype=np.int32)
        flat_labels = np.array([i for _, labels in encoded for i in labels], dtype=np.int32)
        return cls(flat_ids, flat_labels, np.cumsum([0, *lengths], dtype=np.int64))

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
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def digest(self) -> str:
        """Hash of everything that training sees of the data."""
        parts = (self.input_ids, self.labels, self.offsets)
        return hashlib.sha256(
            b"".join(np.ascontiguousarray(p).tobytes() for p in parts)
        ).hexdigest()


@dataclass
class EncodingCount:
    """What became of the records when they were encoded."""

    num_examples: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    shortened: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def encode_records(
    records: list[Record], chat_format, system_prompt: str, max_length: int, overlong: str
) -> tuple[Examples, EncodingCount]:
    """Encode every record.

    Args:
        chat_format: what :func:`tinyllm.chat_format.chat_format_of` gives.
        system_prompt: put before conversations that bring none.
        max_length: most tokens of one example.
        overlong: ``error``, ``drop`` or ``shorten``, for examples over ``max_length``.

    Raises:
        UserError: an example over ``max_length`` under ``error``; nothing left to train on.
    """
    encoded, count = [], EncodingCount()
    for record in records:
        messages = with_system_prompt(record.messages, system_prompt)
        example = _encode(record, messages, chat_format)
        if len(example.input_ids) > max_length:
            example = _fit(record, messages, chat_format, max_length, overlong, count)
        if example is not None:
            encoded.append((example.input_ids, example.labels))
    if not encoded:
        raise UserError(
            f"no example is left: all {len(records)} are longer than --max_length {max_length}"
        )
    examples = Examples.from_lists(encoded)
    count.num_examples, count.num_tokens = len(examples), len(examples.input_ids)
    count.num_supervised = examples.num_supervised
    return examples, count


def _encode(record: Record, messages: list[dict], chat_format):
    try:
        example = chat_format.encode(messages)
    except UserError as error:
        raise UserError(f"{record.where}: {error}") from error
    if not any(example.supervised):
        raise UserError(f"{record.where}: the example has no supervised token, nothing to learn")
    return example


def _fit(record, messages, chat_format, max_length, overlong, count: EncodingCount):
    """Apply the policy for an example that is too long."""
    if overlong == "error":
        length = len(chat_format.encode(messages).input_ids)
        raise UserError(
            f"{record.where}: the example has {length} tokens, --max_length is {max_length}; "
            "raise it, or choose --overlong drop or shorten"
        )
    shorter = shorten(messages, chat_format, max_length) if overlong == "shorten" else None
    (count.dropped if shorter is None else count.shortened).append(record.where)
    return shorter


def shorten(messages: list[dict], chat_format, max_length: int):
    """Shorten a conversation: oldest whole turns first, then the middle of the last prompt.

    The last answer is never touched, so every example keeps its end token.

    Returns:
        The encoded example, or None when the answer alone does not fit.
    """
    system = messages[:1] if messages[0]["role"] == "system" else []
    body = messages[len(system) :]
    while len(body) > 2:
        body = body[2:]
        example = chat_format.encode([*system, *body])
        if len(example.input_ids) <= max_length:
            return example
    return _cut_prompt([*system, *body], chat_format, max_length)


def _cut_prompt(messages: list[dict], chat_format, max_length: int):
    """Longest prompt that fits when characters are taken from its middle (by bisection)."""
    prompt, best = messages[-2]["content"], None
    low, high = 1, len(prompt) - 1
    while low <= high:
        keep = (low + high) // 2
        cut = prompt[: (keep + 1) // 2] + "…" + prompt[len(prompt) - keep // 2 :]
        example = chat_format.encode(
            [*messages[:-2], {"role": "user", "content": cut}, messages[-1]]
        )
        if len(example.input_ids) <= max_length:
            best, low = example, keep + 1
        else:
            high = keep - 1
    return best
