"""What ``native/lora.py`` does, by PyTorch's own products: any processor, any type and width.

The adapter's weights are in float32.  Its products beside a bfloat16 base are in bfloat16 where the
CPU multiplies that in hardware (as under autocast), else in float32, which is faster there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tinyllm.dropout import Dropout
from tinyllm.native_bf16 import cpu_multiplies_bf16


def add_forward(x, downs, ups, outputs, dropouts, scales, past=None) -> list[torch.Tensor]:
    """Add to each layer's output ``y`` (N, out) what its adapter gives, ``scale · dropout(x) Aᵀ Bᵀ``, in place;
    and ``past`` (N, out) to that of a single layer.

    Returns:
        Of each layer ``dropout(x) Aᵀ``, ``(N, r)``, for the backward pass.
    """
    layers = zip(downs, ups, outputs, dropouts, scales, strict=True)
    lows = [_add_forward(x, *layer) for layer in layers]
    if past is not None:
        (output,) = outputs
        output.add_(past)
    return lows


def add_backward(
    x, downs, ups, lows, grads, dx, dropouts, scales
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gradients through the adapters: of each layer ``(dA, dB)`` float32; what reaches ``x`` is added to
    ``dx`` in place, unless that is None.
    """
    layers = zip(downs, ups, lows, grads, dropouts, scales, strict=True)
    return [_add_backward(x, dx, *layer) for layer in layers]


def _add_forward(x, lora_a, lora_b, y, dropout: Dropout | None, scale: float) -> torch.Tensor:
    dtype = product_dtype(x, lora_a)
    low = F.linear(_dropped(x, dropout).to(dtype), lora_a.to(dtype))
    y.addmm_(low.to(y.dtype), lora_b.t().to(y.dtype), alpha=scale)
    return low


def _add_backward(x, dx, lora_a, lora_b, low, grad, dropout: Dropout | None, scale: float):
    dtype = low.dtype
    grad = grad.to(dtype)
    grad_low = (grad @ lora_b.to(dtype)).mul_(scale)
    grad_b = (grad.t() @ low).to(lora_b.dtype).mul_(scale)
    grad_a = (grad_low.t() @ _dropped(x, dropout).to(dtype)).to(lora_a.dtype)
    if dx is not None:
        through_lora = grad_low @ lora_a.to(dtype)
        if dropout is None:
            dx.add_(through_lora)
        else:
            dropout.add(dx, through_lora)
    return grad_a, grad_b


def product_dtype(x: torch.Tensor, lora_a: torch.Tensor) -> torch.dtype:
    """In what the adapter multiplies: see the module's text."""
    native = x.dtype == torch.bfloat16 and cpu_multiplies_bf16()
    return x.dtype if native else lora_a.dtype


def _dropped(x: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    return x if dropout is None else dropout.of(x)
