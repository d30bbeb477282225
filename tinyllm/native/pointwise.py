"""``pointwise.c`` for tensors: what a training step on a CPU does between its matrix products.

The library is compiled at its first use; without a compiler :func:`library` gives None, and whoever
calls has another way.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

from tinyllm.native import code
from tinyllm.neighbours import in_known_rows, with_empty

SOURCE = Path(__file__).with_name("pointwise.c")
HEADERS = code.headers_of(SOURCE, "draws", "numbers", "vectors")
TYPES = (torch.float32, torch.bfloat16)
WITH_MEMORY = (torch.Tensor, torch.nn.Parameter)  # other classes may have none, or not their own
POINTER, NUMBER, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
ARGUMENTS = {
    "keep": [POINTER, POINTER, NUMBER, ctypes.c_uint64, ctypes.c_uint32, INT],
    "add_kept": [POINTER, POINTER, NUMBER, ctypes.c_uint64, ctypes.c_uint32, INT],
    "norm_forward": [POINTER] * 4 + [NUMBER, INT, ctypes.c_float, INT],
    "norm_backward": [POINTER] * 6 + [NUMBER, INT, INT],
    "gate_forward": [POINTER] * 3 + [NUMBER, INT, NUMBER, INT],
    "gate_backward": [POINTER] * 5 + [NUMBER, INT, NUMBER, INT],
    "exponentiate": [POINTER] * 4 + [NUMBER, NUMBER, INT],
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where it cannot be had."""
    return code.functions_of(SOURCE, HEADERS, ARGUMENTS)


def takes(*tensors: torch.Tensor) -> bool:
    """Whether the code reads these: on a CPU, all of one type that it knows."""
    first = tensors[0]
    return (
        first.device.type == "cpu"
        and first.dtype in TYPES
        and all(t.dtype == first.dtype and t.device == first.device for t in tensors)
        and all(type(t) in WITH_MEMORY for t in tensors)
        and library() is not None
    )


def fills_vectors(tensor: torch.Tensor) -> bool:
    """Whether a tensor's rows have a multiple of the processor's lanes of elements."""
    return tensor.shape[-1] % library().lanes() == 0


def _half(tensor: torch.Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)


def keep(x: torch.Tensor, seed: int, threshold: int) -> torch.Tensor:
    """``x`` with about ``threshold`` of 65,536 of its elements set to 0, chosen by the seed."""
    x = x.contiguous()
    y = torch.empty_like(x)
    library().keep(x.data_ptr(), y.data_ptr(), x.numel(), seed, threshold, _half(x))
    return y


def add_kept(y: torch.Tensor, x: torch.Tensor, seed: int, threshold: int) -> None:
    """Add to ``y`` (contiguous) in place what :func:`keep` keeps of ``x``."""
    x = x.contiguous()
    assert y.is_contiguous() and y.shape == x.shape and y.dtype == x.dtype
    library().add_kept(x.data_ptr(), y.data_ptr(), x.numel(), seed, threshold, _half(x))


def exponentiate(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace logits (n, V) by their exponentials, each row up to a factor.

    Returns:
        The cross-entropy of each of ``ids`` (n,), (n,) float32; and each row's sum, (n,) float32, by which
        its exponentials are to be divided to be probabilities.
    """
    assert logits.is_contiguous() and logits.shape[:1] == ids.shape
    ids = words_among(ids, logits.shape[1])
    losses, totals = (torch.empty(len(ids), dtype=torch.float32) for _ in range(2))
    library().exponentiate(
        logits.data_ptr(), ids.data_ptr(), losses.data_ptr(), totals.data_ptr(), *logits.shape,
        _half(logits),
    )  # fmt: skip
    return losses, totals


def words_among(ids: torch.Tensor, num_words: int) -> torch.Tensor:
    """Ids ``(n,)`` that compiled code may look up.

    Raises:
        IndexError: an id is no word.
    """
    assert ids.dtype == torch.int64
    if len(ids) and not 0 <= ids.min() <= ids.max() < num_words:
        raise IndexError(f"ids {ids.min()} to {ids.max()} among {num_words} words")
    return ids.contiguous()


class RmsNorm(torch.autograd.Function):
    """``w x / sqrt(mean(x²) + eps)`` over the last dimension, rounded where transformers' layers round
    (Zhang and Sennrich 2019, arXiv:1910.07467); ``w`` is frozen.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        """``x`` (..., H), ``weight`` (H,) of the same type → (..., H)."""
        x = x.contiguous()
        y, rows = torch.empty_like(x), x.numel() // x.shape[-1]
        factors = torch.empty(rows, dtype=torch.float32, device=x.device)
        library().norm_forward(
            x.data_ptr(), weight.data_ptr(), y.data_ptr(), factors.data_ptr(), rows, x.shape[-1],
            eps, _half(x),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, past=None):
        """``past``: gradient of x that came past the norm, (..., H) as x, to be added to this one."""
        x, weight, factors = ctx.saved_tensors
        grad, dx = grad.contiguous(), torch.empty_like(x)
        past = past if past is None else past.contiguous()
        library().norm_backward(
            grad.data_ptr(), x.data_ptr(), weight.data_ptr(), factors.data_ptr(),
            None if past is None else past.data_ptr(), dx.data_ptr(), len(factors), x.shape[-1],
            _half(x),
        )  # fmt: skip
        return dx, None, None


class SiluGate(torch.autograd.Function):
    """``silu(gate) ∘ up`` (Shazeer 2020, arXiv:2002.05202) of tensors that :func:`fills_vectors`."""

    @staticmethod
    def forward(ctx, gate, up):
        """``gate`` and ``up`` ``(N, inner)`` of one type, which is the result's; where they lie beside each
        other in memory, so do their gradients.
        """
        gate, up = in_known_rows(gate, up)
        y = torch.empty(gate.shape, dtype=gate.dtype)
        library().gate_forward(
            gate.data_ptr(), up.data_ptr(), y.data_ptr(), *y.shape, gate.stride(0), _half(y)
        )
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gate, up), (d_gate, d_up) = with_empty(*ctx.saved_tensors)
        grad = grad.contiguous()
        library().gate_backward(
            grad.data_ptr(), gate.data_ptr(), up.data_ptr(), d_gate.data_ptr(), d_up.data_ptr(),
            *grad.shape, gate.stride(0), _half(grad),
        )  # fmt: skip
        return d_gate, d_up
