"""Frozen matrices laid out once as their products want them, for training on a CPU.

Where ``native/lora.c`` can be had it computes a layer and its adapter at once, from strips of the weight: what
comes out is written once, calls are half as many, and nothing is prepared for a number of tokens that is new.  Its sums are rounded once where those of two products are rounded twice.

Elsewhere, and where the processor multiplies whole tiles (AMX), which that code does not, oneDNN multiplies by
blocks, and for every product brings the matrix into them anew.  For the few hundred tokens of a step of
fine-tuning that is 5 to 10 % of the time.  A frozen matrix can stay so; PyTorch's own compiler does the same for
inference ("weight prepacking" of ``torch.compile``'s freezing), by the two operations used here.  What comes out is
the same, bit for bit in all but degenerate shapes (one or two columns).  With tiles the terms of some products
are added in another order, so that about one number in 10,000 is rounded to its other neighbour.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tinyllm.native.lora import is_even, library, strips_of
from tinyllm.native_bf16 import cpu_multiplies_bf16

# Of the copies, one for each way.  A model of 135M parameters needs 405 MiB; beyond that memory is worth more.
MOST_BYTES = 512 << 20
# oneDNN prepares a product in bfloat16 anew for each number of rows, and keeps it: then few numbers of rows.
FILLED = 64
ROWS = 640  # oneDNN lays out for about so many tokens; it takes any other number, too


class PackedWeight:
    """``W`` (out, in), frozen, for products with it and with its transpose.

    Args:
        weights: the parameters whose memory ``joint`` is; held, so that no other tensor gets that memory and is
            taken for them.
        joint: ``W``, bfloat16 on the CPU; kept for who needs it as it was.
        by_strips: whether ``native/lora.py`` multiplies.

    Attributes:
        strips: for that, or None; then the products are :func:`linear` and :func:`linear_back`.
    """

    def __init__(
        self, weights: Sequence[torch.Tensor], joint: torch.Tensor, by_strips: bool = False
    ) -> None:
        self.held, self.stamps = [weight.detach() for weight in weights], _stamps(weights)
        self.joint = joint.detach()
        self.strips = strips_of(weights) if by_strips else None
        if self.strips is None:
            self.ahead, self.back = _pack(joint), _pack(joint.t().contiguous())

    def is_of(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether these are the weights that were packed, and unchanged as far as autograd counts it: who
        writes through ``.data`` must count it, as :meth:`FastLoraLinear.merge` does.
        """
        return self.stamps == _stamps(weights)

    def __reduce__(self) -> tuple:
        """A copy or a pickle of the model has none: it can be made again."""
        return type(None), ()


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, packed: PackedWeight | None
) -> torch.Tensor:
    """``x Wᵀ + b`` of ``x`` (N, in): (N, out)."""
    odd_bias = bias is not None and bias.dtype != x.dtype
    if packed is None or packed.strips is not None or odd_bias:
        return F.linear(x, weight, bias)
    return _multiply(x, packed.ahead, None if bias is None else bias.contiguous())


def linear_back(
    grad: torch.Tensor, weight: torch.Tensor, packed: PackedWeight | None
) -> torch.Tensor:
    """``g W`` of ``grad`` (N, out): (N, in)."""
    if packed is None or packed.strips is not None:
        return grad @ weight
    return _multiply(grad, packed.back, None)


def in_strips(weights: Sequence[torch.Tensor]) -> bool:
    """Whether ``native/lora.c`` multiplies by weights of this kind: on two cores with AVX-512 BF16 4 to 9 % of a step
    sooner than oneDNN; where there are tiles (AMX), which it does not use, oneDNN's step takes about half the time.
    """
    return not has_tiles() and library() is not None and all(is_even(*w.shape) for w in weights)


def has_tiles() -> bool:
    """Whether the processor multiplies whole tiles of bfloat16 (AMX)."""
    known = getattr(torch.cpu, "_is_amx_tile_supported", None)  # not of every PyTorch
    return known is not None and known()


def can_pack(weight: torch.Tensor) -> bool:
    """Whether a weight is of the kind whose products gain by it, if they can be had."""
    return (
        weight.is_cpu
        and weight.dtype == torch.bfloat16
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
        and not weight.requires_grad
        and not weight.is_inference()  # of which no changes are counted
    )


@functools.cache
def works() -> bool:
    """Whether this PyTorch has the operations, and they give what its ordinary product gives."""
    if not (cpu_multiplies_bf16() and torch.backends.mkldnn.is_available()):
        return False
    numbers = torch.arange(-48 * 64, 48 * 64).remainder(101).sub(50).bfloat16() / 50
    x, weight = numbers[: 48 * 64].view(48, 64), numbers[48 * 64 :].view(48, 64)
    bias, grad = weight[:, 0].contiguous(), x[:, :48].contiguous()
    try:
        ahead = _multiply(x, _pack(weight), bias)
        back = _multiply(grad, _pack(weight.t().contiguous()), None)
    except (AttributeError, RuntimeError):  # they are PyTorch's own affair, and may go
        return False
    return torch.equal(ahead, F.linear(x, weight, bias)) and torch.equal(back, grad @ weight)


def _pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)


def _multiply(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")


def _stamps(weights: Sequence[torch.Tensor]) -> list[tuple]:
    """Where and how they lie, and how often they were changed in place."""
    return [(weight.data_ptr(), weight._version, weight.stride()) for weight in weights]
