"""The engine for small llama-like models on a CPU: one conversation at once, or many side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from transformers import GenerationConfig

from tinyllm.decode.choice import Choice, stops_of, unsupported_options
from tinyllm.decode.side_by_side import SideBySide

CONTEXT_STEP = 512  # the cache is made for the length in use, rounded up to this


class RowReader(Protocol):
    """What takes in ids and gives logits: ``RowDecoder`` (compiled) or ``Decoder`` (torch)."""

    context: int

    def read(self, ids: list[int], start: int = 0) -> torch.Tensor: ...


class FastEngine:
    """Writes as ``generate`` does, token for token, without its work around the arithmetic.

    What a conversation has in common with the one before stays in the cache.
    """

    name = "fast"

    def __init__(
        self, make_row: Callable[[int], RowReader], make_rows: Callable, context: int, why: str = ""
    ) -> None:
        """Set up, computing nothing yet.

        Args:
            make_row: gives a reader for one row of a given length.
            make_rows: gives a ``Decoder`` for ``(num_rows, length)``.
            context: longest sequence that the model takes.
        """
        self.make_row, self.make_rows, self.context, self.why = make_row, make_rows, context, why
        self.reader: RowReader | None = None
        self.taken_in: list[int] = []
        self.num_reused = 0

    def objection(self, config: GenerationConfig) -> str | None:
        """Why these options need ``generate``; None if they do not."""
        options = unsupported_options(config)
        return f"{', '.join(options)} is known to generate only" if options else None

    @torch.inference_mode()
    def write(
        self,
        prompt: list[int],
        config: GenerationConfig,
        on_id: Callable[[int], None] = lambda i: None,
    ) -> list[int]:
        """Ids of the reply to one prompt; ``on_id`` gets each as soon as it is chosen."""
        choose, stops, most = Choice(config), stops_of(config), config.max_new_tokens
        ids = torch.empty(1, len(prompt) + most, dtype=torch.long)
        ids[0, : len(prompt)] = torch.tensor(prompt)
        logits, written = self._take_in(prompt, most), []
        for length in range(len(prompt), len(prompt) + most):
            ids[0, length] = choose(ids[:, :length], logits)[0]
            written.append(int(ids[0, length]))
            on_id(written[-1])
            if written[-1] in stops or len(written) == most:
                break
            logits = self.reader.read(written[-1:], length)
            self.taken_in.append(written[-1])
        return written

    def _take_in(self, prompt: list[int], more: int) -> torch.Tensor:
        """Logits after the prompt; only what differs from what was taken in before is read."""
        needed = len(prompt) + more
        assert needed <= self.context, (needed, self.context)
        if self.reader is None or self.reader.context < needed:
            steps = -(-needed // CONTEXT_STEP)
            self.reader, self.taken_in = self.make_row(min(self.context, steps * CONTEXT_STEP)), []
        start = _num_shared(self.taken_in, prompt[:-1])
        self.taken_in, self.num_reused = prompt[:start], start
        logits = self.reader.read(prompt[start:], start)
        self.taken_in = list(prompt)
        return logits

    def write_many(
        self,
        prompts: list[list[int]],
        config: GenerationConfig,
        on_done: Callable[[int, list[int]], None],
        seeds: list[int] | None = None,
    ) -> None:
        """Answer many prompts side by side; each seed makes its row's sampling reproducible."""
        SideBySide(self.make_rows, prompts, config, on_done, seeds).run()


def _num_shared(before: list[int], now: list[int]) -> int:
    """How many first ids two lists share."""
    shared = 0
    for old, new in zip(before, now, strict=False):
        if old != new:
            break
        shared += 1
    return shared
