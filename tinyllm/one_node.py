"""A decoder layer as one node of autograd, for LoRA training on a CPU.

A layer is about ten steps, each of them compiled or a product.  Between them lie a dozen modules and
nodes of autograd, which for a small model take a fifth of the time, on one thread.  Here the steps
follow each other without them, forwards and then backwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from tinyllm.fast_lora import Joined, LoraLinears
from tinyllm.native.attention import PackedAttention
from tinyllm.native.pointwise import RmsNorm, SiluGate


@dataclass(frozen=True)
class Norm:
    """A frozen RMS norm: weight ``(H,)``, and what is added to the mean square."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True)
class LayerParts:
    """What a layer computes with, all of it frozen but the adapters.

    Attributes:
        head_dim: size of an attention head.
        head_norms: of queries and keys, where the family has them.
        attend: what :class:`PackedAttention` takes behind queries, keys and values.
    """

    first_norm: Norm
    qkv: Joined
    head_dim: int
    head_norms: tuple[Norm, ...]
    attend: tuple
    out: Joined
    second_norm: Norm
    gate_up: Joined
    down: Joined

    def adapters(self) -> list[torch.nn.Parameter]:
        """Of all layers, in the order of their use."""
        linears = (self.qkv, self.out, self.gate_up, self.down)
        return [adapter for joined in linears for adapter in joined.adapters()]


class Step:
    """What autograd's context is for one of the steps."""

    def __init__(self, function: type[torch.autograd.Function], needs_input: bool) -> None:
        self.function, self.needs_input_grad = function, (needs_input,)
        self.saved_tensors: tuple[torch.Tensor, ...] = ()

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        self.saved_tensors = tensors

    def back(self, *grads: torch.Tensor) -> tuple:
        return self.function.backward(self, *grads)


class Steps:
    """The steps of one forward, in order."""

    def __init__(self) -> None:
        self.all: list[Step] = []

    def run(self, function: type[torch.autograd.Function], *inputs, needs_input: bool = True):
        step = Step(function, needs_input)
        self.all.append(step)
        return function.forward(step, *inputs)

    def give_tensors(self) -> list[torch.Tensor]:
        """What all steps saved; they forget it."""
        tensors = [t for step in self.all for t in step.saved_tensors]
        self.sizes = [len(step.saved_tensors) for step in self.all]
        for step in self.all:
            step.saved_tensors = ()
        return tensors

    def take_tensors(self, tensors: tuple[torch.Tensor, ...]) -> list[Step]:
        """The steps with what they saved."""
        start = 0
        for step, size in zip(self.all, self.sizes, strict=True):
            step.saved_tensors = tensors[start : start + size]
            start += size
        return self.all


class DecoderLayer(torch.autograd.Function):
    """``y = x + attention(norm(x))``, ``y + mlp(norm(y))`` (Touvron et al. 2023, arXiv:2302.13971, section
    2.2), with LoRA on every projection.
    """

    @staticmethod
    def forward(ctx, x, parts: LayerParts, *adapters):
        """``x`` (N, H) → (N, H).  ``adapters`` are those of ``parts``, for autograd to see."""
        steps = Steps()
        attended = x + _attention(steps, x, parts, ctx.needs_input_grad[0])
        found = attended + _mlp(steps, attended, parts)
        ctx.save_for_backward(*steps.give_tensors())
        ctx.steps, ctx.head_norms = steps, len(parts.head_norms)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        steps = ctx.steps.take_tensors(ctx.saved_tensors)
        first_norm, qkv, *head_norms, attention, out, second_norm, gate_up, gate, down = steps
        grad_product, down_grads = _linear_back(down, grad.contiguous())
        grad_normed, gate_up_grads = _linear_back(gate_up, *gate.back(grad_product))
        grad_attended = second_norm.back(grad_normed)[0].add_(grad)
        grad_out, out_grads = _linear_back(out, grad_attended)
        grads_qkv = list(attention.back(_heads_of(grad_out, attention))[:3])
        for number, norm in enumerate(head_norms):
            grads_qkv[number] = norm.back(grads_qkv[number])[0]
        grad_normed, qkv_grads = _linear_back(qkv, *(g.flatten(1) for g in grads_qkv))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = first_norm.back(grad_normed)[0].add_(grad_attended)
        return grad_x, None, *qkv_grads, *out_grads, *gate_up_grads, *down_grads


def _attention(steps: Steps, x: torch.Tensor, parts: LayerParts, needs_input: bool) -> torch.Tensor:
    normed = steps.run(RmsNorm, x, parts.first_norm.weight, parts.first_norm.eps)
    projected = _linear(steps, normed, parts.qkv, needs_input)
    heads = [states.unflatten(1, (-1, parts.head_dim)) for states in projected]
    for number, norm in enumerate(parts.head_norms):
        heads[number] = steps.run(RmsNorm, heads[number], norm.weight, norm.eps)
    return _linear(steps, steps.run(PackedAttention, *heads, *parts.attend).flatten(1), parts.out)[
        0
    ]


def _mlp(steps: Steps, x: torch.Tensor, parts: LayerParts) -> torch.Tensor:
    normed = steps.run(RmsNorm, x, parts.second_norm.weight, parts.second_norm.eps)
    gate_up = _linear(steps, normed, parts.gate_up)
    return _linear(steps, steps.run(SiluGate, *gate_up), parts.down)[0]


def _linear(steps: Steps, x: torch.Tensor, layers: Joined, needs_input: bool = True) -> tuple:
    return steps.run(LoraLinears, x, *layers.how(), *layers.adapters(), needs_input=needs_input)


def _linear_back(step: Step, *grads: torch.Tensor) -> tuple[torch.Tensor | None, tuple]:
    """The gradient of the input, and those of the adapters."""
    grad_x, _, _, _, _, *others = step.back(*grads)
    return grad_x, tuple(others)


def _heads_of(grad: torch.Tensor, attention: Step) -> torch.Tensor:
    """The gradient of attention's output ``(N, num_heads * head_dim)``, head by head."""
    return grad.view(attention.saved_tensors[0].shape)
