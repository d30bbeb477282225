"""Dropout whose decisions are a function of a seed, so that nothing need be kept for the backward pass.

A mask of PyTorch is drawn, stored and read again; on a CPU the drawing alone is a good part of a step.  Here
one number of PyTorch's generator, the one that a checkpoint stores, seeds a stream of SplitMix64
(Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), of which each
64-bit number decides four elements by 16 bits each.  ``pointwise.c`` draws it again whenever it is
needed; without a compiler NumPy draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tinyllm.native import pointwise

LANES = 4  # 16-bit random numbers in one 64-bit draw
LANE_VALUES = 1 << 16
STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Dropout:
    """One independent decision for each element of a tensor; dropped with probability ``p``, which is
    rounded to a multiple of 1/65536.  What is kept is not scaled.
    """

    def __init__(self, p: float, seed: int | None = None) -> None:
        self.threshold = min(round(p * LANE_VALUES), LANE_VALUES - 1)
        self.seed = drawn_seeds(1)[0] if seed is None else seed
        self.mask: torch.Tensor | None = None  # only without the compiled code

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` with zeros where it is dropped."""
        if pointwise.takes(x):
            return pointwise.keep(x, self.seed, self.threshold)
        return x * self._mask(x.shape)

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add ``of(x)`` to ``y``, in place."""
        if y.is_contiguous() and pointwise.takes(y, x):
            pointwise.add_kept(y, x, self.seed, self.threshold)
        else:
            y.add_(self.of(x))

    def _mask(self, shape: torch.Size) -> torch.Tensor:
        if self.mask is None:
            self.mask = mask(shape, self.seed, self.threshold)
        return self.mask


def dropouts(rates: Sequence[float]) -> list[Dropout | None]:
    """One for each rate, None where that is 0."""
    seeds = iter(drawn_seeds(sum(p > 0 for p in rates)))
    return [Dropout(p, next(seeds)) if p else None for p in rates]


def drawn_seeds(number: int) -> list[int]:
    """From PyTorch's generator; the same however many are drawn at a time."""
    drawn = torch.empty(number, dtype=torch.int64).random_(-(1 << 63), None)
    return [seed % (1 << 64) for seed in drawn.tolist()]


def mask(shape: torch.Size, seed: int, threshold: int) -> torch.Tensor:
    """The decisions as ``shape`` uint8, 1 for what is kept."""
    size = shape.numel()
    z = np.arange(1, -(-size // LANES) + 1, dtype=np.uint64)
    z *= np.uint64(STEP)
    z += np.uint64(seed)
    for shift, factor in ((30, FIRST), (27, SECOND)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    kept = z.astype("<u8", copy=False).view("<u2")[:size] >= threshold
    return torch.from_numpy(kept.view(np.uint8)).view(shape)
