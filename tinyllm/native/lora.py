"""``lora.c`` for tensors: the low-rank path of a linear layer in bfloat16, for training on a CPU.

Only processors that multiply pairs of bfloat16 (AVX-512 BF16) have it; :func:`takes` says whether.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from tinyllm.native import code
from tinyllm.native.pointwise import WITH_MEMORY

SOURCE = Path(__file__).with_name("lora.c")
HEADERS = code.headers_of(SOURCE, "draws", "pairs", "threads", "numbers", "vectors")
LANES = 16  # the low rows are filled up to a multiple of it
DECIDED, PAIR = 4, 2  # numbers that one random number decides, and that are multiplied together


class Lora(ctypes.Structure):
    """``Lora`` of ``lora.c``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in
          ("x", "grad", "a", "b", "low", "y", "dx", "da", "db")),
        ("rows", ctypes.c_int64),
        ("row_size", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("in_", "out", "rank")),
        ("scale", ctypes.c_float),
        ("seed", ctypes.c_uint64),
        ("threshold", ctypes.c_uint32),
    ]  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where it cannot be had, or would do nothing."""
    call = [ctypes.POINTER(Lora)]
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
        and x.shape[1] % DECIDED == 0
        and lora_b.shape[0] % PAIR == 0
        and library() is not None
    )


def add_forward(x, lora_a, lora_b, y, dropout, scale: float) -> torch.Tensor:
    """Add ``scale · dropout(x) Aᵀ Bᵀ`` to ``y``, in place.

    Args:
        x: ``(N, in)`` bfloat16.
        lora_a: ``(r, in)`` float32.
        lora_b: ``(out, r)`` float32.
        y: ``(N, out)`` bfloat16, may be columns of a wider tensor.
        dropout: a :class:`tinyllm.dropout.Dropout` or None.

    Returns:
        ``dropout(x) Aᵀ`` for the backward pass, ``(N, r filled up)`` bfloat16.
    """
    rank = -(-lora_a.shape[0] // LANES) * LANES
    low = torch.empty(x.shape[0], rank, dtype=x.dtype)
    call = _call(x, lora_a, lora_b, low, y, dropout, scale)
    call.y = y.data_ptr()
    library().lora_forward(call)
    return low


def add_backward(x, lora_a, lora_b, low, grad, dx, dropout, scale: float):
    """Gradients through the adapter: added to ``dx`` (``(N, in)`` bfloat16, or None) in place.

    Args:
        low: what :func:`add_forward` gave.
        grad: ``(N, out)`` bfloat16, may be columns of a wider tensor.

    Returns:
        ``(dA, dB)`` float32.
    """
    da, db = torch.empty_like(lora_a), torch.empty_like(lora_b)
    assert low.is_contiguous() and (dx is None or dx.is_contiguous())
    call = _call(x, lora_a, lora_b, low, grad, dropout, scale)
    call.grad, call.da, call.db = grad.data_ptr(), da.data_ptr(), db.data_ptr()
    if dx is not None:
        call.dx = dx.data_ptr()
    library().lora_backward(call)
    return da, db


def _call(x, lora_a, lora_b, low, wide, dropout, scale: float) -> Lora:
    """What both ways have in common; ``wide`` is ``y`` or ``grad``."""
    row_size, step = wide.stride()
    assert step == 1
    (rank, width), (rows, out) = lora_a.shape, wide.shape
    seed, threshold = (dropout.seed, dropout.threshold) if dropout else (0, 0)
    return Lora(
        x.data_ptr(), None, lora_a.data_ptr(), lora_b.data_ptr(), low.data_ptr(), None, None, None, None,
        rows, row_size, width, out, rank, scale, seed, threshold,
    )  # fmt: skip
