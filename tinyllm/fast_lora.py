"""The LoRA path of a linear layer in few passes over memory, for training on a CPU.

peft's own forward walks over the layer's input and output about ten times, and draws dropout masks
with PyTorch's Bernoulli sampler, which was a fifth of a step on a CPU (see ``dropout.py``).  Here
forward and backward are written out once (Hu et al. 2021, arXiv:2106.09685, section 4.1):

    y = x Wᵀ + s (x ∘ m) Aᵀ Bᵀ          W frozen (out, in), A (r, in), B (out, r), m the mask

The adapter stays peft's: same parameters, same names, same files; only ``forward`` differs, and any
case beyond plain LoRA goes to peft's.

The adapter's weights are in float32.  Its products beside a bfloat16 base are in bfloat16 where the
CPU multiplies that in hardware (as under autocast), else in float32, which is faster there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from torch.autograd.function import once_differentiable

from tinyllm.dropout import Dropout
from tinyllm.native_bf16 import cpu_multiplies_bf16


class LoraLinear(torch.autograd.Function):
    """``y = x Wᵀ + b + scale · dropout(x) Aᵀ Bᵀ`` with a frozen ``W``."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, dropout, scale):
        """``x`` (N, in) → (N, out); ``dropout`` a :class:`Dropout` or None."""
        dtype = product_dtype(x, lora_a)
        a, b = lora_a.to(dtype), lora_b.to(dtype)
        low = F.linear(_dropped(x, dropout).to(dtype), a)
        y = F.linear(x, weight, bias)
        y.addmm_(low.to(y.dtype), b.t().to(y.dtype), alpha=scale)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.dropout, ctx.scale, ctx.types = dropout, scale, (lora_a.dtype, lora_b.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, a, b, low = ctx.saved_tensors
        dtype = low.dtype
        grad_full = grad.to(dtype)
        grad_low = (grad_full @ b).mul_(ctx.scale)
        grad_b = (grad_full.t() @ low).to(ctx.types[1]).mul_(ctx.scale)
        grad_a = (grad_low.t() @ _dropped(x, ctx.dropout).to(dtype)).to(ctx.types[0])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x, through_lora = grad @ weight, grad_low @ a
            if ctx.dropout is None:
                grad_x.add_(through_lora)
            else:
                grad_x = ctx.dropout.add(grad_x, through_lora)
        return grad_x, None, None, grad_a, grad_b, None, None


def product_dtype(x: torch.Tensor, lora_a: torch.Tensor) -> torch.dtype:
    """In what the adapter multiplies: see the module's text."""
    native = x.dtype == torch.bfloat16 and cpu_multiplies_bf16()
    return x.dtype if native else lora_a.dtype


def _dropped(x: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    return x if dropout is None else dropout.of(x)


class FastLoraLinear(PeftLinear):
    """peft's LoRA layer with the forward above where it applies."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if args or kwargs or not self._is_plain(x):
            return super().forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        p = getattr(self.lora_dropout[name], "p", 0.0)
        flat = x.reshape(-1, x.shape[-1])
        y = LoraLinear.apply(
            flat, self.base_layer.weight, self.base_layer.bias,
            self.lora_A[name].weight, self.lora_B[name].weight,
            Dropout(p) if p else None, self.scaling[name] / (1.0 - p),
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
            and not any(p.requires_grad for p in self.base_layer.parameters())
            and not self.lora_bias[self.active_adapters[0]]
        )


def use_fast_lora(config) -> None:
    """Let peft build its LoRA layers as :class:`FastLoraLinear`."""
    config._register_custom_module({nn.Linear: FastLoraLinear})
