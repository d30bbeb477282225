"""``head.c`` for tensors: the loss under a frozen head in bfloat16 and its gradient, without logits in memory.

Only processors that multiply pairs of bfloat16 (AVX-512 BF16) have it; :func:`takes` says whether.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from tinyllm.native import code
from tinyllm.native.pointwise import WITH_MEMORY, words_among

SOURCE = Path(__file__).with_name("head.c")
HEADERS = code.headers_of(SOURCE, "pairs", "threads", "numbers", "vectors")
PAIR = 2  # columns that are multiplied together


class Head(ctypes.Structure):
    """``Head`` of ``head.c``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("hidden", "weight", "ids", "losses", "gradient")),
        ("rows", ctypes.c_int64),
        ("words", ctypes.c_int64),
        ("size", ctypes.c_int32),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where it cannot be had, or would do nothing."""
    found = code.functions_of(SOURCE, HEADERS, {"head_loss": [ctypes.POINTER(Head)]})
    if found is not None:
        found.bytes_of_a_thread.argtypes = [ctypes.c_int32]
        found.bytes_of_a_thread.restype = ctypes.c_int64
    return found


def takes(*tensors: torch.Tensor) -> bool:
    """Whether the code reads these, hidden states or a head: bfloat16 in an even width."""
    return (
        all(t.device.type == "cpu" and t.dtype == torch.bfloat16 for t in tensors)
        and all(type(t) in WITH_MEMORY for t in tensors)
        and all(t.is_contiguous() and t.shape[1] % PAIR == 0 for t in tensors)
        and library() is not None
    )


def losses(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cross-entropy of ``ids`` under the logits ``hidden Wᵀ``, and the gradient of its sum.

    Args:
        hidden: ``(n, hidden_size)`` bfloat16.
        weight: ``(V, hidden_size)`` bfloat16.
        ids: ``(n,)`` int64.

    Returns:
        ``(n,)`` float32; and ``(n, hidden_size)`` bfloat16, or None.

    Raises:
        IndexError: an id is no word.
    """
    ids = words_among(ids, len(weight))
    found = torch.empty(len(ids), dtype=torch.float32)
    gradient = torch.empty_like(hidden) if with_gradient else None
    library().head_loss(Head(
        hidden.data_ptr(), weight.data_ptr(), ids.data_ptr(), found.data_ptr(),
        gradient.data_ptr() if with_gradient else None, *hidden.shape[:1], *weight.shape,
    ))  # fmt: skip
    return found, gradient


def scratch_bytes(weight: torch.Tensor) -> int:
    """Memory that :func:`losses` takes for itself under the head ``weight`` (V, hidden_size)."""
    return torch.get_num_threads() * library().bytes_of_a_thread(weight.shape[1])
