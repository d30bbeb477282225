"""``lora.c`` for tensors: the low-rank path of a linear layer in bfloat16, for training on a CPU.

Only processors that multiply pairs of bfloat16 (AVX-512 BF16) have it; :func:`takes` says whether.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from tinyllm.native import code

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
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and lora_a.dtype == lora_b.dtype == torch.float32
        and all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in (x, lora_a, lora_b))
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
    rank = -(-len(lora_a) // LANES) * LANES
    low = torch.empty(len(x), rank, dtype=x.dtype)
    library().lora_forward(_call(scale, dropout, y, x=x, a=lora_a, b=lora_b, low=low, y=y))
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
    tensors = {"x": x, "a": lora_a, "b": lora_b, "low": low, "grad": grad, "da": da, "db": db}
    more = {} if dx is None else {"dx": dx}
    library().lora_backward(_call(scale, dropout, grad, **tensors, **more))
    return da, db


def _call(scale: float, dropout, wide: torch.Tensor, **tensors: torch.Tensor) -> Lora:
    """``wide`` is the one of the tensors that may be columns of a wider one."""
    assert all(tensor.is_contiguous() or tensor is wide for tensor in tensors.values())
    assert wide.stride(1) == 1
    x, a, b = tensors["x"], tensors["a"], tensors["b"]
    return Lora(
        rows=len(x), row_size=wide.stride(0), in_=a.shape[1], out=b.shape[0], rank=a.shape[0], scale=scale,
        seed=dropout.seed if dropout else 0, threshold=dropout.threshold if dropout else 0,
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )  # fmt: skip
