"""The LoRA path of a linear layer in few passes over memory, for training on a CPU.

peft's own forward walks over the layer's input and output about ten times, and draws dropout masks
with PyTorch's Bernoulli sampler, which is a fifth of a step on a CPU.  Here forward and backward are
written out once (Hu et al. 2021, arXiv:2106.09685, section 4.1):

    y = x Wᵀ + s (x ∘ m) Aᵀ Bᵀ          W frozen (out, in), A (r, in), B (out, r), m the mask

The adapter stays peft's: same parameters, same names, same files; only ``forward`` differs, and any
case beyond plain LoRA goes to peft's.

The adapter's weights are in float32.  Its products beside a bfloat16 base are in bfloat16 where the
CPU multiplies that in hardware (as under autocast), else in float32, which is faster there.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from tinyllm.native_bf16 import cpu_multiplies_bf16

LANES = 4  # 16-bit random numbers in one 64-bit draw
LANE_VALUES = 1 << 16


def dropout_mask(shape: torch.Size, p: float) -> torch.Tensor:
    """Independent keep/drop decisions, ``shape`` uint8, 1 with probability ``1 - p``.

    One 64-bit number of PyTorch's generator decides four elements by 16 bits each, so ``p`` is
    rounded to a multiple of 1/65536.  The generator is the one that a checkpoint stores.
    """
    size = shape.numel()
    draws = torch.empty((size + LANES - 1) // LANES, dtype=torch.int64).random_(-(1 << 63), None)
    threshold = round(p * LANE_VALUES) - LANE_VALUES // 2
    # NumPy compares 16-bit integers several times faster than PyTorch does on a CPU
    kept = draws.view(torch.int16)[:size].numpy() >= threshold
    return torch.from_numpy(kept.view(np.uint8)).view(shape)


class LoraLinear(torch.autograd.Function):
    """``y = x Wᵀ + b + scale · (x ∘ mask) Aᵀ Bᵀ`` with a frozen ``W``."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, mask, scale):
        """``x`` (N, in) → (N, out); ``mask`` (N, in) uint8 or None."""
        dtype = product_dtype(x, lora_a)
        low = F.linear(_masked(x, mask).to(dtype), lora_a.to(dtype))
        y = F.linear(x, weight, bias)
        y.addmm_(low.to(y.dtype), lora_b.t().to(y.dtype), alpha=scale)
        ctx.save_for_backward(x, weight, lora_a, lora_b, mask, low)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, lora_a, lora_b, mask, low = ctx.saved_tensors
        dtype = low.dtype
        grad_full = grad.to(dtype)
        grad_low = (grad_full @ lora_b.to(dtype)).mul_(ctx.scale)
        grad_b = (grad_full.t() @ low).to(lora_b.dtype).mul_(ctx.scale)
        grad_a = (grad_low.t() @ _masked(x, mask).to(dtype)).to(lora_a.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            through_lora = grad_low @ lora_a.to(dtype)
            if mask is not None:
                through_lora.mul_(mask)
            grad_x = (grad @ weight).add_(through_lora)
        return grad_x, None, None, grad_a, grad_b, None, None


def product_dtype(x: torch.Tensor, lora_a: torch.Tensor) -> torch.dtype:
    """In what the adapter multiplies: see the module's text."""
    native = x.dtype == torch.bfloat16 and cpu_multiplies_bf16()
    return x.dtype if native else lora_a.dtype


def _masked(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return x if mask is None else x * mask


class FastLoraLinear(PeftLinear):
    """peft's LoRA layer with the forward above where it applies."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if args or kwargs or not self._is_plain(x):
            return super().forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        p = getattr(self.lora_dropout[name], "p", 0.0)
        flat = x.reshape(-1, x.shape[-1])
        mask = dropout_mask(flat.shape, p) if p else None
        y = LoraLinear.apply(
            flat, self.base_layer.weight, self.base_layer.bias,
            self.lora_A[name].weight, self.lora_B[name].weight,
            mask, self.scaling[name] / (1.0 - p),
        )  # fmt: skip
        return y.view(*x.shape[:-1], -1)

    def _is_plain(self, x: torch.Tensor) -> bool:
        """Training one ordinary adapter on a frozen, unmerged linear layer, on a CPU.

        With gradients off, too: a checkpointed layer is first run without them, and must draw the
        same dropout as when it is run again for its gradients.
        """
        return (
            self.training
            and x.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")  # chooses the dtype of each product itself
            and len(self.active_adapters) == 1
            and self.active_adapters[0] in self.lora_A
            and not (self.disable_adapters or self.merged or self.lora_variant)
            and type(self.base_layer) is nn.Linear
            and not self.base_layer.weight.requires_grad
            and not self.lora_bias[self.active_adapters[0]]
        )


def use_fast_lora(config) -> None:
    """Let peft build its LoRA layers as :class:`FastLoraLinear`."""
    config._register_custom_module({nn.Linear: FastLoraLinear})
