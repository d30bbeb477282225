"""The LoRA path of a linear layer in few passes over memory, for training on a CPU.

peft's own forward walks over the layer's input and output about ten times, and draws dropout masks
with PyTorch's Bernoulli sampler, which was a fifth of a step on a CPU (see ``dropout.py``).  Here
forward and backward are written out once (Hu et al. 2021, arXiv:2106.09685, section 4.1):

    y = x Wᵀ + s (x ∘ m) Aᵀ Bᵀ          W frozen (out, in), A (r, in), B (out, r), m the mask

The adapter stays peft's: same parameters, same names, same files; only ``forward`` differs, and any
case beyond plain LoRA goes to peft's.

What the adapter adds comes from ``native/lora.c`` where the CPU multiplies bfloat16 in hardware and the
base is in bfloat16, else from ``lora_by_torch.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from torch.autograd.function import once_differentiable

from tinyllm import lora_by_torch as by_torch
from tinyllm.dropout import Dropout
from tinyllm.native import lora as compiled


class LoraLinear(torch.autograd.Function):
    """``y = x Wᵀ + b + scale · dropout(x) Aᵀ Bᵀ`` with a frozen ``W``."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, dropout, scale):
        """``x`` (N, in) → (N, out); ``dropout`` a :class:`Dropout` or None."""
        y = F.linear(x, weight, bias)
        part = compiled if compiled.takes(x, lora_a, lora_b) else by_torch
        low = part.add_forward(x, lora_a, lora_b, y, dropout, scale)
        ctx.save_for_backward(x, weight, lora_a, lora_b, low)
        ctx.part, ctx.dropout, ctx.scale = part, dropout, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, lora_a, lora_b, low = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_a, grad_b = ctx.part.add_backward(
            x, lora_a, lora_b, low, grad, grad_x, ctx.dropout, ctx.scale
        )
        return grad_x, None, None, grad_a, grad_b, None, None


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
        return y.view(*x.shape[:-1], y.shape[-1])

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
