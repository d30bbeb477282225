"""``lora.c`` for tensors: linear layers with low-rank paths in bfloat16, for training on a CPU.

Only processors that multiply pairs of bfloat16 (AVX-512 BF16) have it; :func:`takes` says whether.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tinyllm.native import code
from tinyllm.native.pointwise import WITH_MEMORY

SOURCE = Path(__file__).with_name("lora.c")
HEADERS = code.headers_of(
    SOURCE,
    "lora_ahead",
    "lora_back",
    "lora_layer",
    "draws",
    "pairs",
    "threads",
    "numbers",
    "vectors",
)
STRIP = 32  # columns of a strip
LANES = 16  # the low rows are filled up to a multiple of it
DECIDED, PAIR = 4, 2  # numbers that one random number decides, and that are multiplied together


class Lora(ctypes.Structure):
    """``Lora`` of ``lora.c``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "a", "b", "low")),
        ("rows", ctypes.c_int64),
        ("row_size", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("in_", "out", "rank")),
        ("scale", ctypes.c_float),
        ("seed", ctypes.c_uint64),
        ("threshold", ctypes.c_uint32),
        *((name, ctypes.c_void_p) for name in
          ("y", "past", "ahead", "bias", "grad", "dx", "da", "db", "back")),
    ]  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where it cannot be had, or would do nothing."""
    call = [ctypes.POINTER(Lora), ctypes.c_int32]
    return code.functions_of(SOURCE, HEADERS, {"lora_forward": call, "lora_backward": call})


def takes(x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor) -> bool:
    """Whether the code reads these: bfloat16 inputs beside a float32 adapter, in widths it knows."""
    return (
        x.dtype == torch.bfloat16
        and lora_a.dtype == lora_b.dtype == torch.float32
        and x.is_cpu
        and type(x) in WITH_MEMORY
        and type(lora_a) in WITH_MEMORY
        and type(lora_b) in WITH_MEMORY
        and x.is_contiguous()
        and lora_a.is_contiguous()
        and lora_b.is_contiguous()
        and is_even(lora_b.shape[0], x.shape[1])
        and library() is not None
    )


def is_even(out: int, width: int) -> bool:
    """Whether the code knows layers ``(out, in)`` of these sizes."""
    return width % DECIDED == 0 and out % PAIR == 0


class Strips(NamedTuple):
    """Frozen weights ``W_i`` (out_i, in) of layers with one input, as the code multiplies by them: pairs of
    neighbours along the dimension that is summed over in one word, columns in strips behind each other.

    Attributes:
        ahead: of each layer ``W_iᵀ`` ``(strips, in / 2, STRIP)`` int32.
        back: all ``W_i`` below each other, ``(strips, sum of out_i / 2, STRIP)`` int32.
    """

    ahead: list[torch.Tensor]
    back: torch.Tensor


def strips_of(weights: Sequence[torch.Tensor]) -> Strips:
    """The strips of layers' weights, bfloat16, ``in`` and each ``out_i`` even."""
    ahead = [_in_strips(_pairs(weight.detach().t())) for weight in weights]
    return Strips(ahead, _in_strips(torch.cat([_pairs(weight.detach()) for weight in weights])))


def _pairs(x: torch.Tensor) -> torch.Tensor:
    """Neighbouring rows of ``x`` (n, columns) in one word: ``(n / 2, columns)`` int32."""
    return torch.stack([x[::2], x[1::2]], -1).view(torch.int32).squeeze(-1)


def _in_strips(words: torch.Tensor) -> torch.Tensor:
    """``(n, columns)`` → ``(strips, n, STRIP)``, filled up with zeros."""
    filled = F.pad(words, (0, -words.shape[1] % STRIP))
    return filled.unflatten(1, (-1, STRIP)).transpose(0, 1).contiguous()


def add_forward(
    x, downs, ups, outputs, dropouts, scales, past=None, strips=None, bias=None
) -> list[torch.Tensor]:
    """Each layer's output ``y``, in place: ``x Wᵀ + b + scale · dropout(x) Aᵀ Bᵀ`` with the strips of ``W``; without
    them the low-rank path is added to what is there.

    Args:
        x: ``(N, in)`` bfloat16, the input of all layers.
        downs: of each layer ``A`` ``(r, in)`` float32.
        ups: of each layer ``B`` ``(out, r)`` float32.
        outputs: of each layer ``y`` ``(N, out)`` bfloat16, may be columns of a wider tensor.
        dropouts: of each layer a :class:`tinyllm.dropout.Dropout` or None.
        past: ``(N, out)`` bfloat16, added to the output of a single layer, or None.
        bias: all layers' ``b`` behind each other, bfloat16, or None; added to what is there, too.

    Returns:
        Of each layer ``dropout(x) Aᵀ`` for the backward pass, ``(N, r filled up)`` bfloat16.
    """
    lows = [x.new_empty(x.shape[0], -(-a.shape[0] // LANES) * LANES) for a in downs]
    calls = _calls(x, downs, ups, lows, outputs, dropouts, scales)
    at = 0 if bias is None else bias.data_ptr()
    for number, (call, y) in enumerate(zip(calls, outputs, strict=True)):
        call.y = y.data_ptr()
        if strips is not None:
            call.ahead = strips.ahead[number].data_ptr()
        if bias is not None:
            call.bias = at
            at += bias.element_size() * call.out
    if past is not None:
        assert len(calls) == 1 and past.is_contiguous() and past.shape == outputs[0].shape
        calls[0].past = past.data_ptr()
    library().lora_forward(calls, len(calls))
    return lows


def add_backward(
    x, downs, ups, lows, grads, dx, dropouts, scales, strips=None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gradients: into ``dx`` (``(N, in)`` bfloat16, or None) with the strips of the weights; without them the low-rank
    path's is added to what is there.

    Args:
        lows: what :func:`add_forward` gave.
        grads: of each layer ``(N, out)`` bfloat16, beside each other in the columns of one tensor.

    Returns:
        Of each layer ``(dA, dB)`` float32.
    """
    assert all(low.is_contiguous() for low in lows) and (dx is None or dx.is_contiguous())
    found = [(torch.empty_like(a), torch.empty_like(b)) for a, b in zip(downs, ups, strict=True)]
    calls = _calls(x, downs, ups, lows, grads, dropouts, scales)
    for call, grad, (da, db) in zip(calls, grads, found, strict=True):
        call.grad, call.da, call.db = grad.data_ptr(), da.data_ptr(), db.data_ptr()
        call.dx = None if dx is None else dx.data_ptr()
    if strips is not None:
        calls[0].back = strips.back.data_ptr()
    library().lora_backward(calls, len(calls))
    return found


def _calls(x, downs, ups, lows, wides, dropouts, scales) -> ctypes.Array[Lora]:
    """What both ways have in common; ``wides`` are the outputs or their gradients."""
    layers = zip(downs, ups, lows, wides, dropouts, scales, strict=True)
    return (Lora * len(downs))(*(_call(x, *layer) for layer in layers))


def _call(x, lora_a, lora_b, low, wide, dropout, scale: float) -> Lora:
    row_size, step = wide.stride()
    assert step == 1
    (rank, width), (rows, out) = lora_a.shape, wide.shape
    seed, threshold = (dropout.seed, dropout.threshold) if dropout else (0, 0)
    return Lora(
        x.data_ptr(), lora_a.data_ptr(), lora_b.data_ptr(), low.data_ptr(),
        rows, row_size, width, out, rank, scale, seed, threshold,
    )  # fmt: skip
