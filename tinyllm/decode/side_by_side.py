"""Many prompts answered together: a row that ends makes room for the next prompt at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import GenerationConfig

from tinyllm.decode.choice import Choice, stops_of

MAX_ROWS = 64


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
        self.waiting = iter(range(len(prompts)))

    @torch.inference_mode()
    def run(self) -> None:
        """Answer everything."""
        if not self.prompts:
            return
        context = max(map(len, self.prompts)) + self.most
        self.decoder = self.make_rows(min(MAX_ROWS, len(self.prompts)), context)
        num_rows = len(self.decoder.rows)
        self.ids = torch.zeros(num_rows, context, dtype=torch.long)
        self.lengths = [0] * num_rows
        self.owners: list[int | None] = [None] * num_rows
        self.generators: list = [None] * num_rows
        for row in range(num_rows):
            self._start_next(row)
        while any(owner is not None for owner in self.owners):
            self._drop_idle_rows()
            self._step()

    def _start_next(self, row: int) -> None:
        """Give a free row the next prompt that is not answered by its very first id."""
        for index in self.waiting:
            prompt = self.prompts[index]
            self.owners[row], self.lengths[row] = index, len(prompt)
            self.ids[row] = prompt[0]  # behind the end stands an id that occurs anyway
            self.ids[row, : len(prompt)] = torch.tensor(prompt)
            if self.seeds is not None:
                self.generators[row] = torch.Generator().manual_seed(self.seeds[index])
            logits = self.decoder.read(prompt, 0, row)
            drawn = None if self.seeds is None else [self.generators[row]]
            if not self._append(row, int(self.choose(self.ids[row : row + 1], logits, drawn))):
                return
        self.owners[row] = None

    def _append(self, row: int, one: int) -> bool:
        """Add an id to a row; hands the row's reply over and returns True if that ends it."""
        self.ids[row, self.lengths[row]] = one
        self.lengths[row] += 1
        index = self.owners[row]
        start = len(self.prompts[index])
        if one not in self.stops and self.lengths[row] - start < self.most:
            return False
        self.on_done(index, self.ids[row, start : self.lengths[row]].tolist())
        return True

    def _step(self) -> None:
        """One more id for every row at work."""
        positions = torch.tensor([max(length - 1, 0) for length in self.lengths])
        newest = self.ids.gather(1, positions[:, None])[:, 0]
        longest = int(positions.max())
        logits = self.decoder.step(newest, positions, longest)
        drawn = self.generators if self.seeds is not None else None
        chosen = self.choose(self.ids[:, : longest + 1], logits, drawn).tolist()
        for row, one in enumerate(chosen):
            if self.owners[row] is not None and self._append(row, one):
                self._start_next(row)

    def _drop_idle_rows(self) -> None:
        """Near the end, when half of the rows have nothing left to do, go on with the others."""
        busy = [row for row, owner in enumerate(self.owners) if owner is not None]
        if 2 * len(busy) > len(self.owners):
            return
        self.decoder.keep_rows(busy)
        self.ids = self.ids[busy]
        for name in ("lengths", "owners", "generators"):
            setattr(self, name, [getattr(self, name)[row] for row in busy])
