"""Weights in fewer bytes where that loses nothing, as ``row.c`` reads them.

``FLOATS``: float32 as they are. ``HALVES``: bfloat16. ``PACKED``: bfloat16 in 12 bits. Of the 8 bits of
the exponent, trained weights use few values: fifteen cover all but one in some thousand of a
matrix (the same fact is used by DFloat11, Zhang et al. 2025, arXiv:2504.11651, with a code of
varying length). So a vector register of weights and a half is opened by a few vector operations:
with ``L`` lanes of float32,

    2 x 4 L bytes   sign and mantissa of a weight each
        4 L bytes   a code for the exponent, two weights a byte (first those of the first 4 L)

Code 0 is the exponent 0. A weight whose exponent has no code is 0 there, and stands in a list of
its own: row, column, value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tinyllm.decode.pages import Pages

FLOATS, HALVES, PACKED = range(3)  # as in row_math.h
MAX_STRAYS = 1 / 500  # of all weights; with more, reading them apart would cost what packing saves


class Stored(NamedTuple):
    """A weight matrix for ``row.c``."""

    kind: int
    weight: torch.Tensor
    table: torch.Tensor | None = None  # (2, 16) uint8, upper and lower byte of each code's exponent
    strays: torch.Tensor | None = None  # (N, 3) int32


class Compact:
    """The compact copies of a model's weights, made once for all its adapters."""

    def __init__(self, lanes: int, packs: bool) -> None:
        """What the processor takes.

        Args:
            lanes: how many floats ``row.c`` takes at a time.
            packs: whether it reads ``PACKED``.
        """
        self.lanes, self.packs, self.pages = lanes, packs, Pages()
        # by address; the weight is kept, so that its address stays its own
        self.copies: dict[int, tuple[torch.Tensor, Stored]] = {}

    def of(self, weight: torch.Tensor) -> Stored:
        """The copy of a weight ``(out, in)``, or the weight where bfloat16 would round it."""
        key = weight.data_ptr()
        if key not in self.copies:
            self.copies[key] = weight, self._make(weight)
        return self.copies[key][1]

    def _make(self, weight: torch.Tensor) -> Stored:
        half = weight.to(torch.bfloat16)
        if weight.shape[1] % (2 * self.lanes) or not torch.equal(half.float(), weight):
            return Stored(FLOATS, weight)
        packed = pack(half, self.lanes) if self.packs else None
        stored = packed or Stored(HALVES, paired(half, self.lanes))
        return stored._replace(weight=self.pages.copy(stored.weight))


def paired(half: torch.Tensor, lanes: int) -> torch.Tensor:
    """Each ``2 * lanes`` numbers as words of two: number ``i`` below, number ``i + lanes`` above."""
    return half.view(half.shape[0], -1, 2, lanes).transpose(2, 3).reshape(half.shape)


def pack(half: torch.Tensor, lanes: int) -> Stored | None:
    """A bfloat16 matrix ``(out, in)`` as ``PACKED``.

    Returns:
        None where ``in`` is no multiple of ``8 * lanes``, or more than ``MAX_STRAYS`` of the weights
        have no code.
    """
    if half.shape[1] % (8 * lanes):
        return None
    bits = half.contiguous().view(torch.int16).int() & 0xFFFF
    exponent, sign_and_mantissa = (bits >> 7) & 0xFF, (bits >> 8 & 0x80) | bits & 0x7F
    counts = torch.bincount(exponent.flatten(), minlength=256)
    counts[0] = 0  # has its code in any case
    common = torch.cat([torch.zeros(1, dtype=torch.long), counts.topk(15).indices])
    code_of = torch.full((256,), -1)
    code_of[common] = torch.arange(16)
    code = code_of[exponent]
    astray = code < 0
    if astray.sum() > MAX_STRAYS * half.numel():
        return None
    packed = _laid_out(code.masked_fill(astray, 0), sign_and_mantissa.masked_fill(astray, 0), lanes)
    table = torch.stack([common >> 1, common << 7 & 0x80]).to(torch.uint8)
    return Stored(PACKED, packed, table, _listed(half, astray))


def _laid_out(code: torch.Tensor, sign_and_mantissa: torch.Tensor, lanes: int) -> torch.Tensor:
    """Bytes ``(out, 3 / 2 in)``; see ``open_packed`` in row_math.h for the order."""
    rows = code.shape[0]
    # Registers are shuffled in quarters of 16 bytes. A byte's place in its vector: quarter, half of
    # it, word, half of a word; which of the four vectors of floats it becomes: the two halves.
    code, rest = (
        part.view(rows, -1, 2, 2, 2, lanes // 4, 4).permute(0, 1, 2, 5, 3, 6, 4).flatten(3)
        for part in (code, sign_and_mantissa)
    )  # (rows, G, 2, 4 lanes)
    codes = code[:, :, :1] | code[:, :, 1:] << 4
    return torch.cat([rest, codes], dim=2).to(torch.uint8).reshape(rows, -1)


def _listed(half: torch.Tensor, astray: torch.Tensor) -> torch.Tensor:
    places = astray.nonzero()
    values = half[astray].float().view(torch.int32)
    return torch.cat([places.to(torch.int32), values[:, None]], dim=1).contiguous()
