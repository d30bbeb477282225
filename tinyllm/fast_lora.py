"""The LoRA path of a linear layer in few passes over memory, for training on a CPU.

peft's own forward walks over the layer's input and output about ten times, and draws dropout masks
with PyTorch's Bernoulli sampler, which was a fifth of a step on a CPU (see ``dropout.py``).  Here it is
one node of autograd (``lora_linears.py``).  Layers that read the same input (queries, keys and values; gate and
up) are one product, and have their own adapters and masks in it.

The adapter stays peft's: same parameters, same names, same files; only ``forward`` differs, and any
case beyond plain LoRA goes to peft's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from tinyllm.dropout import dropouts
from tinyllm.lora_linears import LoraLinears
from tinyllm.neighbours import below_each_other, lay_below
from tinyllm.packed_weights import PackedWeight, can_pack, in_strips, works


class Part(NamedTuple):
    """A layer with LoRA: ``W`` (out, in) and bias, ``A`` (r, in), ``B`` (out, r), the rate of dropout, and what
    the adapter's output is multiplied with where something is dropped.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    down: torch.nn.Parameter
    up: torch.nn.Parameter
    p: float
    scale: float


class FastLoraLinear(PeftLinear):
    """peft's LoRA layer with the forward above where it applies."""

    packed: PackedWeight | None = None  # the first of joined layers has that of all of them

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        part = None if args or kwargs else self.taken_apart(x)
        if part is None:
            return super().forward(x, *args, **kwargs)
        return _outputs(x, _alone(self, part))[0]

    def merge(self, *args, **kwargs) -> None:
        try:
            super().merge(*args, **kwargs)
        finally:
            self._count_change()

    def unmerge(self) -> None:
        try:
            super().unmerge()
        finally:
            self._count_change()

    def _count_change(self) -> None:
        """Of the weight, which peft writes behind autograd's back."""
        torch.autograd.graph.increment_version(self.get_base_layer().weight)

    def taken_apart(self, x: torch.Tensor) -> Part | None:
        """The tensors of one ordinary adapter that is trained on a frozen, unmerged linear layer on a CPU;
        None for anything else.

        With gradients off, too: a checkpointed layer is first run without them, and must draw the
        same dropout as when it is run again for its gradients.
        """
        autocast = torch.is_autocast_enabled("cpu")  # chooses the dtype of each product itself
        if not self.training or autocast or not x.is_cpu or self.disable_adapters or self.merged:
            return None
        modules = self._modules  # looked up so, since a module's attributes are slow
        names = self.active_adapters
        base, downs = modules["base_layer"], modules["lora_A"]._modules
        if (
            type(base) is not nn.Linear
            or len(names) != 1
            or names[0] not in downs
            or self.lora_variant
        ):
            return None
        name, weight, bias = names[0], base._parameters["weight"], base._parameters["bias"]
        frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        if not frozen or self.lora_bias[name]:
            return None
        p = getattr(modules["lora_dropout"]._modules[name], "p", 0.0)
        up = modules["lora_B"]._modules[name]
        return Part(weight, bias, downs[name].weight, up.weight, p, self.scaling[name] / (1.0 - p))


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see when a module is called, forwards or backwards, or took the call over."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class Joined(NamedTuple):
    """Layers that read one input, as one product: ``W_i`` (out_i, in) below each other, as their biases."""

    weight: torch.Tensor
    packed: PackedWeight | None
    bias: torch.Tensor | None
    parts: list[Part]

    def how(self) -> tuple:
        """Inputs of :class:`LoraLinears` from ``weight`` to the adapters; dropout is drawn here."""
        drops = dropouts([part.p for part in self.parts])
        return self.weight, self.packed, self.bias, drops, [part.scale for part in self.parts]

    def adapters(self) -> list[torch.nn.Parameter]:
        """The A_i of all layers, and then their B_i."""
        return [part.down for part in self.parts] + [part.up for part in self.parts]


def joined(x: torch.Tensor, *layers: torch.nn.Module) -> Joined | None:
    """Layers that are plain for ``x`` and whose weights lie below each other, as one layer's do."""
    parts = []
    for layer in layers:
        part = None
        if type(layer) is FastLoraLinear and not has_hooks(layer):
            part = layer.taken_apart(x)
        if part is None:
            return None
        parts.append(part)
    if len(parts) == 1:
        return _alone(layers[0], part)
    weights = [part.weight for part in parts]
    packed = layers[0].packed
    known = packed is not None and packed.is_of(weights)
    weight = packed.joint if known else below_each_other(weights)
    biases = [part.bias for part in parts if part.bias is not None]
    if weight is None or len(biases) not in (0, len(parts)):
        return None
    bias = torch.cat(biases) if biases else None
    if packed is not None and not known:  # what was laid out is of other weights
        layers[0].packed = packed = None
    return Joined(weight, packed, bias, parts)


def _alone(layer: FastLoraLinear, part: Part) -> Joined:
    return Joined(part.weight, _packed(layer, [part.weight]), part.bias, [part])


def _packed(layer: FastLoraLinear, weights: list[torch.Tensor]) -> PackedWeight | None:
    """What a layer has of these weights; it is given up when they are no longer what they were."""
    if layer.packed is not None and not layer.packed.is_of(weights):
        layer.packed = None
    return layer.packed


def project(x: torch.Tensor, *layers: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    """What some linear layers, with LoRA or without, make of one ``x`` (..., in): (..., out_i).

    In one product where they can be :func:`joined`.
    """
    found = joined(x, *layers)
    return _outputs(x, found) if found else tuple(layer(x) for layer in layers)


def _outputs(x: torch.Tensor, found: Joined) -> tuple[torch.Tensor, ...]:
    flat = x.reshape(-1, x.shape[-1])
    outputs = LoraLinears.apply(flat, None, *found.how(), *found.adapters())
    return tuple(y.unflatten(0, x.shape[:-1]) for y in outputs)


def lay_together(*layers: torch.nn.Module) -> None:
    """Move the frozen weights of layers that read one input into one storage, below each other."""
    if not all(type(layer) is FastLoraLinear for layer in layers):
        return
    weights = [layer.base_layer.weight for layer in layers]
    alike = all(w.dtype == weights[0].dtype and w.ndim == 2 for w in weights)
    if alike and not any(w.requires_grad for w in weights) and below_each_other(weights) is None:
        lay_below(weights)


def pack(*layers: torch.nn.Module) -> None:
    """Lay out the frozen weights of layers that read one input for their products, together if they can be."""
    weights = [layer.base_layer.weight for layer in layers]
    joint = below_each_other(weights)
    if joint is None:
        for layer in layers:
            pack(layer)
    elif _packed(layers[0], weights) is None:
        layers[0].packed = PackedWeight(weights, joint, all(map(multiplies_in_strips, layers)))


def multiplies_in_strips(layer: torch.nn.Module) -> bool:
    """Whether a layer that can be packed is computed by ``native/lora.c``, with its adapters."""
    base, bias = layer.base_layer, layer.base_layer.bias
    parts = [*layer.lora_A.parameters(), *layer.lora_B.parameters()]
    return (
        in_strips([base.weight])
        and (bias is None or (bias.dtype == base.weight.dtype and bias.is_contiguous()))
        and all(part.dtype == torch.float32 and part.is_contiguous() for part in parts)
    )


def can_be_packed(layer: torch.nn.Module) -> bool:
    """Whether :func:`pack` can do something for a layer in training."""
    return (
        type(layer) is FastLoraLinear
        and type(layer.base_layer) is nn.Linear
        and not layer.lora_variant
        and can_pack(layer.base_layer.weight)
        and (multiplies_in_strips(layer) or works())
    )


def use_fast_lora(config) -> None:
    """Let peft build its LoRA layers as :class:`FastLoraLinear`."""
    config._register_custom_module({nn.Linear: FastLoraLinear})
