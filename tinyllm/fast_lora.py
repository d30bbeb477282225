"""The LoRA path of a linear layer in few passes over memory, for training on a CPU.

peft's own forward walks over the layer's input and output about ten times, and draws dropout masks
with PyTorch's Bernoulli sampler, which was a fifth of a step on a CPU (see ``dropout.py``).  Here
forward and backward are written out once (Hu et al. 2021, arXiv:2106.09685, section 4.1):

    y = x Wᵀ + s (x ∘ m) Aᵀ Bᵀ          W frozen (out, in), A (r, in), B (out, r), m the mask

Layers that read the same input (queries, keys and values; gate and up) are one product, and have their
own adapters and masks in it.

The adapter stays peft's: same parameters, same names, same files; only ``forward`` differs, and any
case beyond plain LoRA goes to peft's.

What the adapter adds comes from ``native/lora.c`` where the CPU multiplies bfloat16 in hardware and the
base is in bfloat16, else from ``lora_by_torch.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from torch.autograd.function import once_differentiable

from tinyllm import lora_by_torch as by_torch
from tinyllm.dropout import Dropout
from tinyllm.native import lora as compiled
from tinyllm.neighbours import below_each_other, beside_each_other, lay_below


class LoraLinears(torch.autograd.Function):
    """``x W_iᵀ + b_i + scale_i · dropout_i(x) A_iᵀ B_iᵀ`` of some layers i, with frozen ``W_i``."""

    @staticmethod
    def forward(ctx, x, weight, bias, dropouts, scales, *adapters):
        """``x`` (N, in) → (N, out_i) of each layer, beside each other in memory.

        Args:
            weight: the layers' W_i (out_i, in) below each other, as ``bias`` (or None).
            dropouts: of each layer a :class:`Dropout` or None.
            adapters: the A_i (r_i, in) of all layers, and then their B_i (out_i, r_i).
        """
        joint = F.linear(x, weight, bias)
        layers = range(len(dropouts))
        downs, ups = adapters[: len(layers)], adapters[len(layers) :]
        # a lone output stays the whole tensor: others may change it in place, as no view may be
        outputs = joint.split([len(up) for up in ups], 1) if len(layers) > 1 else (joint,)
        ctx.dropouts, ctx.scales = dropouts, scales
        ctx.compiled = [compiled.takes(x, downs[i], ups[i]) for i in layers]
        lows = [
            _part(ctx.compiled[i]).add_forward(
                x, downs[i], ups[i], outputs[i], dropouts[i], scales[i]
            )
            for i in layers
        ]
        ctx.save_for_backward(x, weight, *adapters, *lows)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, weight, *rest = ctx.saved_tensors
        size = len(grads)
        downs, ups, lows = (rest[i : i + size] for i in (0, size, 2 * size))
        joint = beside_each_other(grads)
        if joint is None:
            joint = torch.cat(grads, 1) if size > 1 else grads[0].contiguous()
        grad_x = joint @ weight if ctx.needs_input_grad[0] else None
        columns = joint.split([len(up) for up in ups], 1)
        found = [
            _part(ctx.compiled[i]).add_backward(
                x, downs[i], ups[i], lows[i], columns[i], grad_x, ctx.dropouts[i], ctx.scales[i]
            )
            for i in range(size)
        ]
        return grad_x, None, None, None, None, *(a for a, _ in found), *(b for _, b in found)


def _part(is_compiled: bool):
    """The module that computes what an adapter adds."""
    return compiled if is_compiled else by_torch


class FastLoraLinear(PeftLinear):
    """peft's LoRA layer with the forward above where it applies."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if args or kwargs or not self._is_plain(x):
            return super().forward(x, *args, **kwargs)
        return _outputs(x, Joined(self.base_layer.weight, self.base_layer.bias, (self,)))[0]

    @property
    def name(self) -> str:
        """Of the adapter that is used."""
        return self.active_adapters[0]

    def can_be_joined(self, x: torch.Tensor) -> bool:
        """Whether nothing but the forward above happens when the layer is called."""
        return self._is_plain(x) and not has_hooks(self)

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
            and self.name in self.lora_A
            and not (self.disable_adapters or self.merged or self.lora_variant)
            and type(self.base_layer) is nn.Linear
            and not self.base_layer.weight.requires_grad
            and not (self.base_layer.bias is not None and self.base_layer.bias.requires_grad)
            and not self.lora_bias[self.name]
        )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see when a module is called, forwards or backwards."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


@dataclass(frozen=True)
class Joined:
    """Layers that read one input, as one product: ``W_i`` (out_i, in) below each other, as their biases."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    layers: tuple[FastLoraLinear, ...]

    def how(self) -> tuple:
        """Inputs of :class:`LoraLinears` between ``x`` and the adapters; dropout is drawn here."""
        rates = [getattr(one.lora_dropout[one.name], "p", 0.0) for one in self.layers]
        scales = [
            one.scaling[one.name] / (1.0 - p) for one, p in zip(self.layers, rates, strict=True)
        ]
        return self.weight, self.bias, [Dropout(p) if p else None for p in rates], scales

    def adapters(self) -> tuple[torch.nn.Parameter, ...]:
        """The A_i of all layers, and then their B_i."""
        down = [one.lora_A[one.name].weight for one in self.layers]
        return *down, *(one.lora_B[one.name].weight for one in self.layers)


def joined(x: torch.Tensor, *layers: torch.nn.Module) -> Joined | None:
    """Layers that are plain for ``x`` and whose weights lie below each other, as one layer's do."""
    if not all(type(layer) is FastLoraLinear and layer.can_be_joined(x) for layer in layers):
        return None
    bases = [layer.base_layer for layer in layers]
    weight = below_each_other([base.weight for base in bases])
    biases = [base.bias for base in bases if base.bias is not None]
    if weight is None or len(biases) not in (0, len(bases)):
        return None
    return Joined(weight, torch.cat(biases) if biases else None, layers)


def project(x: torch.Tensor, *layers: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    """What some linear layers, with LoRA or without, make of one ``x`` (..., in): (..., out_i).

    In one product where they can be :func:`joined`.
    """
    found = joined(x, *layers)
    return _outputs(x, found) if found else tuple(layer(x) for layer in layers)


def _outputs(x: torch.Tensor, found: Joined) -> tuple[torch.Tensor, ...]:
    flat = x.reshape(-1, x.shape[-1])
    outputs = LoraLinears.apply(flat, *found.how(), *found.adapters())
    return tuple(y.unflatten(0, x.shape[:-1]) for y in outputs)


def lay_together(*layers: torch.nn.Module) -> None:
    """Move the frozen weights of layers that read one input into one storage, below each other."""
    if not all(type(layer) is FastLoraLinear for layer in layers):
        return
    weights = [layer.base_layer.weight for layer in layers]
    alike = all(w.dtype == weights[0].dtype and w.ndim == 2 for w in weights)
    if alike and not any(w.requires_grad for w in weights) and below_each_other(weights) is None:
        lay_below(weights)


def use_fast_lora(config) -> None:
    """Let peft build its LoRA layers as :class:`FastLoraLinear`."""
    config._register_custom_module({nn.Linear: FastLoraLinear})
