"""Weights as bfloat16 where that loses nothing, in the order and the memory that ``row.c`` reads fast."""

from __future__ import annotations

import mmap

import torch

CHUNK = 32 * 1024**2
ALIGNED = 64  # bytes of a cache line


class Halves:
    """Copies of half the size, one after another in large memory pages.

    A pass over a model touches every page of it; with small pages, finding them takes a good part of
    the time.
    """

    def __init__(self, lanes: int) -> None:
        """``lanes``: how many floats ``row.c`` takes at a time on this processor."""
        self.lanes = lanes
        self.copies: dict[int, torch.Tensor] = {}
        self.chunk: mmap.mmap | None = None
        self.used = 0

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """The copy of a weight ``(out, in)``, or the weight where bfloat16 would round it."""
        key = weight.data_ptr()
        if key not in self.copies:
            half = weight.to(torch.bfloat16)
            exact = weight.shape[1] % (2 * self.lanes) == 0 and torch.equal(half.float(), weight)
            self.copies[key] = self._store(paired(half, self.lanes)) if exact else weight
        return self.copies[key]

    def _store(self, half: torch.Tensor) -> torch.Tensor:
        size = -(-half.numel() * 2 // ALIGNED) * ALIGNED
        if self.chunk is None or self.used + size > len(self.chunk):
            self.chunk, self.used = mmap.mmap(-1, max(CHUNK, size)), 0
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self.chunk.madvise(mmap.MADV_HUGEPAGE)
        place = torch.frombuffer(
            self.chunk, dtype=torch.bfloat16, count=half.numel(), offset=self.used
        )
        self.used += size
        return place.view(half.shape).copy_(half)


def paired(half: torch.Tensor, lanes: int) -> torch.Tensor:
    """Each ``2 * lanes`` numbers as words of two: number ``i`` below, number ``i + lanes`` above."""
    return half.view(half.shape[0], -1, 2, lanes).transpose(2, 3).reshape(half.shape)
