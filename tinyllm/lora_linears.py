"""Linear layers with LoRA that read one input, as one node of autograd, for training on a CPU.

Forward and backward are written out once (Hu et al. 2021, arXiv:2106.09685, section 4.1):

    y = x Wᵀ + s (x ∘ m) Aᵀ Bᵀ          W frozen (out, in), A (r, in), B (out, r), m the mask

What the adapter adds comes from ``native/lora.c`` where the CPU multiplies bfloat16 in hardware and the
base is in bfloat16, else from ``lora_by_torch.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable

from tinyllm import lora_by_torch as by_torch
from tinyllm.native import lora as compiled
from tinyllm.neighbours import beside_each_other
from tinyllm.packed_weights import linear, linear_back

NOT_ADAPTERS = 6  # inputs of LoraLinears between x and the adapters


class LoraLinears(torch.autograd.Function):
    """``x W_iᵀ + b_i + scale_i · dropout_i(x) A_iᵀ B_iᵀ`` of some layers i, with frozen ``W_i``."""

    @staticmethod
    def forward(ctx, x, past, weight, packed, bias, dropouts, scales, *adapters):
        """``x`` (N, in) → (N, out_i) of each layer, beside each other in memory.

        Args:
            past: (N, out), added to what a single layer gives, or None.  It is not differentiated.
            weight: the layers' W_i (out_i, in) below each other, as ``bias`` (or None).
            packed: the same weight, laid out for its products, or None.
            dropouts: of each layer a :class:`tinyllm.dropout.Dropout` or None.
            adapters: the A_i (r_i, in) of all layers, and then their B_i (out_i, r_i).
        """
        downs, ups = adapters[: len(scales)], adapters[len(scales) :]
        known = all(compiled.takes(x, a, b) for a, b in zip(downs, ups, strict=True))
        ctx.native = compiled if known else by_torch
        same = bias is None or (bias.dtype == x.dtype and bias.is_contiguous())
        strips = packed.strips if known and same and packed is not None else None
        joint = (
            linear(x, weight, bias, packed) if strips is None else x.new_empty(len(x), len(weight))
        )
        # a lone output stays the whole tensor: others may change it in place, as no view may be
        outputs = joint.split_with_sizes(_widths(ups), 1) if len(ups) > 1 else (joint,)
        ctx.packed, ctx.strips, ctx.dropouts, ctx.scales = packed, strips, dropouts, scales
        more = () if strips is None else (strips, bias)
        lows = ctx.native.add_forward(x, downs, ups, outputs, dropouts, scales, past, *more)
        ctx.save_for_backward(x, weight, *adapters, *lows)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, weight, *rest = ctx.saved_tensors
        size = len(grads)
        downs, ups, lows = (rest[i : i + size] for i in (0, size, 2 * size))
        joint = beside_each_other(grads) if size > 1 else grads[0].contiguous()
        if joint is None:
            joint = torch.cat(grads, 1)
        grad_x, strips, columns = None, ctx.strips, joint.split_with_sizes(_widths(ups), 1)
        if ctx.needs_input_grad[0]:
            grad_x = (
                linear_back(joint, weight, ctx.packed) if strips is None else torch.empty_like(x)
            )
        found = ctx.native.add_backward(
            x, downs, ups, lows, columns, grad_x, ctx.dropouts, ctx.scales,
            *([] if strips is None else [strips]),
        )  # fmt: skip
        return grad_x, *[None] * NOT_ADAPTERS, *(a for a, _ in found), *(b for _, b in found)


def _widths(ups: Sequence[torch.Tensor]) -> list[int]:
    """Of the outputs of layers with these ``B_i`` (out_i, r_i)."""
    return [up.shape[0] for up in ups]
