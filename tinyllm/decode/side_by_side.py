"""Many prompts answered together: what all begin with is read once, and a row that ends makes room for
the next prompt at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import takewhile

import torch
from transformers import GenerationConfig

from tinyllm.decode.choice import Choice, stops_of

MAX_ROWS = 64
WORTH_A_PASS = 8  # one row in so many is free


class SideBySide:
    """The rows at work; every row has a place in ``ids`` and in the decoder's cache."""

    def __init__(
        self,
        make_rows: Callable,
        prompts: list[list[int]],
        config: GenerationConfig,
        on_done: Callable[[int, list[int]], None],
        seeds: list[int] | None,
    ) -> None:
        self.prompts, self.on_done, self.seeds = prompts, on_done, seeds
        self.choose, self.stops, self.most = Choice(config), stops_of(config), config.max_new_tokens
        self.make_rows = make_rows
        self.waiting = deque(range(len(prompts)))

    @torch.inference_mode()
    def run(self) -> None:
        """Answer everything."""
        if not self.prompts:
            return
        context = max(map(len, self.prompts)) + self.most
        self.decoder = self.make_rows(min(MAX_ROWS, len(self.prompts)), context)
        num_rows = len(self.decoder.rows)
        self.num_shared = num_shared(self.prompts)  # a system prompt, mostly
        if self.num_shared:
            self.decoder.share(self.prompts[0][: self.num_shared])
        self.ids = torch.zeros(num_rows, context, dtype=torch.long)
        self.lengths = [0] * num_rows
        self.owners: list[int | None] = [None] * num_rows
        self.generators: list = [None] * num_rows
        while self.waiting or any(owner is not None for owner in self.owners):
            self._start_waiting()
            self._drop_idle_rows()
            if self.owners:
                self._step()

    def _start_waiting(self) -> None:
        """Give free rows the next prompts, as soon as it is worth a pass over the weights."""
        free = [row for row, owner in enumerate(self.owners) if owner is None]
        while self.waiting and len(free) * WORTH_A_PASS >= len(self.owners):
            rows = free[: len(self.waiting)]
            prompts = [self._start(row, self.waiting.popleft()) for row in rows]
            rest = [prompt[self.num_shared :] for prompt in prompts]
            logits = self.decoder.read_many(rest, rows, self.num_shared)
            drawn = None if self.seeds is None else [self.generators[row] for row in rows]
            longest = max(map(len, prompts))
            for row, one in zip(
                rows, self.choose(self.ids[rows, :longest], logits, drawn).tolist(), strict=True
            ):
                self._append(row, one)
            free = [row for row in free if self.owners[row] is None]

    def _start(self, row: int, index: int) -> list[int]:
        prompt = self.prompts[index]
        self.owners[row], self.lengths[row] = index, len(prompt)
        self.ids[row] = prompt[0]  # behind the end stands an id that occurs anyway
        self.ids[row, : len(prompt)] = torch.tensor(prompt)
        if self.seeds is not None:
            self.generators[row] = torch.Generator().manual_seed(self.seeds[index])
        return prompt

    def _append(self, row: int, one: int) -> None:
        """Add an id to a row; where that ends its reply, hand it over and free the row."""
        self.ids[row, self.lengths[row]] = one
        self.lengths[row] += 1
        index = self.owners[row]
        start = len(self.prompts[index])
        if one in self.stops or self.lengths[row] - start == self.most:
            self.owners[row] = None
            self.on_done(index, self.ids[row, start : self.lengths[row]].tolist())

    def _step(self) -> None:
        """One more id for every row at work."""
        positions = torch.tensor([max(length - 1, 0) for length in self.lengths])
        newest = self.ids.gather(1, positions[:, None])[:, 0]
        longest = int(positions.max())
        logits = self.decoder.step(newest, positions, longest)
        drawn = self.generators if self.seeds is not None else None
        chosen = self.choose(self.ids[:, : longest + 1], logits, drawn).tolist()
        for row, one in enumerate(chosen):
            if self.owners[row] is not None:
                self._append(row, one)

    def _drop_idle_rows(self) -> None:
        """Near the end, when half of the rows have nothing left to do, go on with the others."""
        busy = [row for row, owner in enumerate(self.owners) if owner is not None]
        if self.waiting or 2 * len(busy) > len(self.owners):
            return
        self.decoder.keep_rows(busy)
        self.ids = self.ids[busy]
        for name in ("lengths", "owners", "generators"):
            setattr(self, name, [getattr(self, name)[row] for row in busy])


def num_shared(prompts: list[list[int]]) -> int:
    """How many first ids all prompts have in common; each keeps at least one of its own."""
    first, last = min(prompts), max(prompts)  # in order, these two differ the earliest
    same = (a == b for a, b in zip(first, last, strict=False))
    return min(sum(takewhile(bool, same)), min(map(len, prompts)) - 1)
