"""Conversations → ids, a thousand at a time, with the policy for those that are too long.

A tokenizer that is called with a list works on all cores; one that is called text by text spends
most of its time on the way in and out.  Both give the same ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from tinyllm.chat_format import IGNORE_INDEX, Piece, with_system_prompt
from tinyllm.errors import UserError
from tinyllm.records import Record
from tinyllm.shortening import shorten

BATCH_ROWS = 1000
BATCH_CHARACTERS = 2**20
NO_WORD = "nothing to learn: its answers give no token"
NO_END = "an answer without an end token: the base's chat template writes none"


@dataclass(frozen=True)
class LengthRules:
    """Most tokens of an example, and what becomes of a longer one: error, drop or shorten."""

    max_length: int
    overlong: str = "error"


@dataclass(frozen=True)
class Outcome:
    """What became of one record.

    Attributes:
        ids: token ids, ``(T,)`` int32; None when it gives no example.
        labels: targets, ``(T,)`` int32, ``IGNORE_INDEX`` where nothing is learned; None likewise.
        refused: the reason, when it cannot be used.
        num_tokens: its tokens before shortening.
        shortened: whether something was taken out.
    """

    ids: np.ndarray | None = None
    labels: np.ndarray | None = None
    refused: str = ""
    num_tokens: int = 0
    shortened: bool = False


class Prepared(NamedTuple):
    """A conversation and the pieces in which it will be encoded."""

    messages: list[dict]
    pieces: list[Piece]


class Encoder:
    """Encodes records for one chat format.

    Args:
        chat_format: what :func:`tinyllm.chat_format.chat_format_of` gives.
        system_prompt: put before conversations that bring none.
        rules: what to do about long ones; under ``error`` they give no example.
    """

    def __init__(self, chat_format, system_prompt: str, rules: LengthRules) -> None:
        self.chat_format, self.system_prompt, self.rules = chat_format, system_prompt, rules
        tokenizer = chat_format.text.tokenizer
        self.end_ids = np.array(
            sorted({*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids})
        )

    def encode_all(self, records: Iterable[Record]) -> Iterator[tuple[Record, Outcome]]:
        """Encode a stream of records, in order.

        While one batch is with the tokenizer, which needs no Python, the next is being read; only
        that thread touches the tokenizer, which is not made for two.
        """
        with ThreadPoolExecutor(1) as worker:
            waiting: tuple[list[Record], Future] | None = None
            for batch in in_batches(records):
                at_work = worker.submit(self._encode, batch)
                if waiting is not None:
                    yield from zip(waiting[0], waiting[1].result(), strict=True)
                waiting = batch, at_work
            if waiting is not None:
                yield from zip(waiting[0], waiting[1].result(), strict=True)

    def _prepare(self, record: Record) -> Prepared | Outcome:
        messages = with_system_prompt(record.messages, self.system_prompt)
        try:
            return Prepared(messages, list(self.chat_format.pieces(messages)))
        except UserError as error:
            return Outcome(refused=str(error))

    def _encode(self, records: list[Record]) -> list[Outcome]:
        batch = [self._prepare(record) for record in records]
        ready = [one for one in batch if isinstance(one, Prepared)]
        encoded = self._judged(*encode_pieces(self.chat_format.text, [one.pieces for one in ready]))
        done = (
            self._outcome(one.messages, *parts) for one, parts in zip(ready, encoded, strict=True)
        )
        return [next(done) if isinstance(one, Prepared) else one for one in batch]

    def _judged(
        self, ids: np.ndarray, learned: np.ndarray, ends: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
        """Cut a batch into its conversations: ids ``(T,)``, labels ``(T,)``, and what is wrong.

        Wrong is what would teach the model nothing, or never to stop.
        """
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        last = learned.copy()
        last[:-1] &= ~learned[1:]
        num_learned, num_last = _sums(learned, starts, ends), _sums(last, starts, ends)
        num_endless = _sums(last & ~np.isin(ids, self.end_ids), starts, ends)
        labels = np.where(learned, ids, np.int32(IGNORE_INDEX))
        for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            flaw = NO_END if num_endless[i] else NO_WORD if num_learned[i] <= num_last[i] else ""
            yield ids[start:end], labels[start:end], flaw

    def _outcome(
        self, messages: list[dict], ids: np.ndarray, labels: np.ndarray, flaw: str
    ) -> Outcome:
        size = len(ids)
        if flaw:
            return Outcome(refused=flaw)
        if size <= self.rules.max_length:
            return Outcome(ids, labels, num_tokens=size)
        if self.rules.overlong != "shorten":
            return Outcome(num_tokens=size)
        try:
            shorter = shorten(messages, self.chat_format, self.rules.max_length)
        except UserError as error:  # a template may refuse a conversation without its first turns
            return Outcome(refused=str(error))
        if shorter is None:
            return Outcome(num_tokens=size)
        ids, labels = (np.array(part, np.int32) for part in (shorter.input_ids, shorter.labels))
        return Outcome(ids, labels, num_tokens=size, shortened=True)


def _sums(marks: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """How many marks lie in each stretch, ``(num_stretches,)``."""
    total = np.concatenate([[0], np.cumsum(marks)])
    return total[ends] - total[starts]


def encode_pieces(
    text, conversations: list[list[Piece]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encode the pieces of many conversations at once.

    Args:
        text: the chat format's :class:`tinyllm.chat_format.PlainText`.

    Returns:
        All ids behind each other, ``(N,)`` int32; which are supervised, ``(N,)`` bool; and where
        each conversation ends, ``(num_conversations,)``.
    """
    pieces = list(chain.from_iterable(conversations))
    # markers and system prompts are the same in every row
    plain = list(dict.fromkeys(p.text for p in pieces if p.ids is None and not p.typed))
    known = dict(zip(plain, encode_texts(text, plain), strict=True))
    ids = [known[p.text] if p.ids is None and not p.typed else text.piece(p) for p in pieces]
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    flat = np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=int(lengths.sum()))
    learned = np.repeat(np.array([p.supervised for p in pieces], dtype=bool), lengths)
    num_pieces = np.cumsum([len(found) for found in conversations], dtype=np.int64)
    ends = np.concatenate([[0], np.cumsum(lengths)])[num_pieces].astype(np.int64)
    return flat, learned, ends


def encode_texts(text, texts: list[str]) -> list[list[int]]:
    """Ids of texts that we wrote or that spell no special token, on all cores."""
    tokenizer = text.tokenizer
    if not texts or not tokenizer.is_fast:
        return [text.trusted(one) for one in texts]
    backend = tokenizer.backend_tokenizer
    # what a call of the tokenizer itself would set first
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]


def in_batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Cut a stream into batches that are bounded in rows and in characters."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += sum(len(message["content"]) for message in record.messages)
        if len(batch) == BATCH_ROWS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
