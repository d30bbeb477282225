"""A decoder layer as one node of autograd, for LoRA training on a CPU.

A layer is about ten steps, each of them compiled or a product.  Between them lie a dozen modules and
nodes of autograd, which for a small model take a fifth of the time, on one thread.  Here the steps
follow each other without them, forwards and then backwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from tinyllm.fast_lora import Joined
from tinyllm.lora_linears import NOT_ADAPTERS, LoraLinears
from tinyllm.native.attention import PackedAttention
from tinyllm.native.pointwise import RmsNorm, SiluGate
from tinyllm.packed_weights import FILLED


class Norm(NamedTuple):
    """A frozen RMS norm: weight ``(H,)``, and what is added to the mean square."""

    weight: torch.Tensor
    eps: float


class LayerParts(NamedTuple):
    """What a layer computes with, all of it frozen but the adapters.

    Attributes:
        head_norms: of queries and keys, where the family has them.
        head_dim: size of an attention head.
        attend: what :class:`PackedAttention` takes behind queries, keys and values.
        keep: ``(n,)`` positions whose results are wanted, n > 0, none of them twice, or None for all.
    """

    first_norm: Norm
    second_norm: Norm
    head_norms: tuple[Norm, ...]
    head_dim: int
    attend: tuple
    qkv: Joined
    out: Joined
    gate_up: Joined
    down: Joined
    keep: torch.Tensor | None = None

    def adapters(self) -> list[torch.nn.Parameter]:
        """Of all layers, in the order of their use."""
        linears = (self.qkv, self.out, self.gate_up, self.down)
        return [adapter for joined in linears for adapter in joined.adapters()]

    def is_prepared(self) -> bool:
        """Whether the products behind the attention are prepared for a number of rows: oneDNN's in bfloat16."""
        linears = (self.out, self.gate_up, self.down)
        strips = all(one.packed is not None and one.packed.strips is not None for one in linears)
        return self.out.weight.dtype == torch.bfloat16 and not strips


class Step:
    """What autograd's context is for one of the steps."""

    def __init__(self, function: type[torch.autograd.Function], needs_input: bool) -> None:
        self.function, self.needs_input_grad = function, (needs_input,)
        self.saved_tensors: tuple[torch.Tensor, ...] = ()
        self.place = slice(0, 0)  # of them among all that the layer saved

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        self.saved_tensors = tensors


class Steps:
    """The steps of a layer by their names.  Between forward and backward only autograd has their tensors."""

    def __init__(self) -> None:
        self.by_name: dict[str, Step] = {}
        self.tensors: tuple[torch.Tensor, ...] = ()

    def run(self, name: str, function, *inputs, needs_input: bool = True):
        """What a step's function makes of the inputs."""
        self.by_name[name] = step = Step(function, needs_input)
        outputs = function.forward(step, *inputs)
        first = len(self.tensors)
        self.tensors += step.saved_tensors
        step.place, step.saved_tensors = slice(first, len(self.tensors)), ()
        return outputs

    def back(self, name: str, *grads: torch.Tensor) -> tuple:
        """The gradients of a step's inputs."""
        step = self.by_name[name]
        step.saved_tensors = self.tensors[step.place]
        try:
            return step.function.backward(step, *grads)
        finally:
            step.saved_tensors = ()


class DecoderLayer(torch.autograd.Function):
    """``y = x + attention(norm(x))``, ``y + mlp(norm(y))`` (Touvron et al. 2023, arXiv:2302.13971, section
    2.2), with LoRA on every projection.
    """

    @staticmethod
    def forward(ctx, x, parts: LayerParts, *adapters):
        """``x`` (N, H) → (N, H), or (n, H) of the positions to keep.  ``adapters`` are those of ``parts``, for
        autograd to see.
        """
        steps, x = Steps(), x.contiguous()  # compiled code adds it to what the layer gives
        attended = _attention(steps, x, parts, ctx.needs_input_grad[0])
        found = _mlp(steps, attended, parts)
        ctx.save_for_backward(*steps.tensors)
        steps.tensors = ()
        ctx.steps, ctx.num_filled = steps, 0
        if parts.keep is not None:
            ctx.num_filled = len(found) - len(parts.keep)
            found = found[: len(parts.keep)]
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        steps = ctx.steps
        steps.tensors = ctx.saved_tensors
        try:
            grad = F.pad(grad, (0, 0, 0, ctx.num_filled)) if ctx.num_filled else grad.contiguous()
            grad_attended, of_mlp = _mlp_back(steps, grad)
            grad_x, of_attention = _attention_back(steps, grad_attended, ctx.needs_input_grad[0])
        finally:
            steps.tensors = ()
        return grad_x, None, *of_attention, *of_mlp


class Kept(torch.autograd.Function):
    """Rows of a tensor; the gradient of the others is 0."""

    @staticmethod
    def forward(ctx, x, keep, multiple):
        """``x`` (N, H) → :func:`kept` rows of it."""
        ctx.save_for_backward(keep)
        ctx.num_rows = len(x)
        return kept(x, keep, multiple)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (keep,) = ctx.saved_tensors
        found = grad.new_zeros(ctx.num_rows, grad.shape[1])
        return found.index_copy_(0, keep, grad[: len(keep)]), None, None


def kept(x: torch.Tensor, keep: torch.Tensor, multiple: int) -> torch.Tensor:
    """The rows ``keep`` (n,) of ``x`` (N, H), filled up to a multiple of rows with zeros."""
    rows, missing = x.index_select(0, keep), -len(keep) % multiple
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def _attention(steps: Steps, x: torch.Tensor, parts: LayerParts, needs_input: bool) -> torch.Tensor:
    """``x + attention(norm(x))``."""
    normed = _norm(steps, "first norm", x, parts.first_norm)
    projected = _linear(steps, "qkv", normed, parts.qkv, needs_input)
    heads = [states.unflatten(1, (-1, parts.head_dim)) for states in projected]
    for number, norm in enumerate(parts.head_norms):
        heads[number] = _norm(steps, f"head norm {number}", heads[number], norm)
    attended = steps.run("attention", PackedAttention, *heads, *parts.attend).flatten(1)
    if parts.keep is not None:
        multiple = FILLED if parts.is_prepared() else 1
        attended = steps.run("keep", Kept, attended, parts.keep, multiple)
        x = kept(x, parts.keep, multiple)
    return _linear(steps, "out", attended, parts.out, past=x)[0]


def _attention_back(steps: Steps, grad: torch.Tensor, needs_input: bool):
    """The gradients of ``x + attention(norm(x))``'s input, or None, and of the adapters."""
    grad_out, of_out = _linear_back(steps, "out", grad)
    if "keep" in steps.by_name:
        grad_out, grad = (steps.back("keep", one)[0] for one in (grad_out, grad))
    heads = steps.tensors[steps.by_name["attention"].place][0].shape
    grads = list(steps.back("attention", grad_out.view(heads))[:3])
    for number, one in enumerate(grads):
        if (name := f"head norm {number}") in steps.by_name:
            grads[number] = steps.back(name, one)[0]
    grad_normed, of_qkv = _linear_back(steps, "qkv", *(g.flatten(1) for g in grads))
    grad_x = steps.back("first norm", grad_normed, grad)[0] if needs_input else None
    return grad_x, (*of_qkv, *of_out)


def _mlp(steps: Steps, x: torch.Tensor, parts: LayerParts) -> torch.Tensor:
    """``x + mlp(norm(x))``."""
    normed = _norm(steps, "second norm", x, parts.second_norm)
    product = steps.run("gate", SiluGate, *_linear(steps, "gate up", normed, parts.gate_up))
    return _linear(steps, "down", product, parts.down, past=x)[0]


def _mlp_back(steps: Steps, grad: torch.Tensor) -> tuple[torch.Tensor, tuple]:
    """The gradients of ``y + mlp(norm(y))``'s input and of the adapters."""
    grad_product, of_down = _linear_back(steps, "down", grad)
    grad_normed, of_gate_up = _linear_back(steps, "gate up", *steps.back("gate", grad_product))
    return steps.back("second norm", grad_normed, grad)[0], (*of_gate_up, *of_down)


def _norm(steps: Steps, name: str, x: torch.Tensor, norm: Norm) -> torch.Tensor:
    return steps.run(name, RmsNorm, x, norm.weight, norm.eps)


def _linear(
    steps: Steps,
    name: str,
    x: torch.Tensor,
    layers: Joined,
    needs_input: bool = True,
    past: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    inputs = (x, past, *layers.how(), *layers.adapters())
    return steps.run(name, LoraLinears, *inputs, needs_input=needs_input)


def _linear_back(steps: Steps, name: str, *grads: torch.Tensor):
    """The gradient of the input, and those of the adapters."""
    grad_x, *others = steps.back(name, *grads)
    return grad_x, tuple(others[NOT_ADAPTERS:])
