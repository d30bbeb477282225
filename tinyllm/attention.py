"""Attention over packed examples: one row holds many, none sees another, nothing is padded.

Transformers builds an ``(N, N)`` mask for a packed row, so that the cost grows with the square of
the whole micro-batch.  Here examples of similar length are laid beside each other for one call of
PyTorch's causal kernel, without a mask, and laid back behind each other afterwards.  The model is
told by ``cu_seq_lens_q``, the same keyword that flash-attention kernels take.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "packed_sdpa"


def packed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attend within each packed example; plain SDPA where nothing is packed (generation).

    Args:
        query: ``(1, num_heads, N, head_dim)``.
        key: ``(1, num_key_value_heads, N, head_dim)``.
        value: ``(1, num_key_value_heads, N, head_dim)``.
        cu_seq_lens_q: ``(num_examples + 1,)``, where each example starts, and ``N``.

    Returns:
        ``(1, N, num_heads, head_dim)`` and None for the attention weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.pop("sliding_window", None)
    layout = lay_out(cu_seq_lens_q)
    # (N, heads, head_dim): each position's heads lie together, so that moving it is one copy
    flat = [states[0].transpose(0, 1) for states in (query, key, value)]
    outputs = []
    for group in layout.groups:
        q, k, v = (
            Move.apply(s, group.source, group.place, None).unflatten(0, group.shape) for s in flat
        )
        q, k, v = (states.transpose(1, 2).to(kernel_dtype(query)) for states in (q, k, v))
        attended = sdpa_attention_forward(module, q, k, v, _window_mask(q, window), **kwargs)[0]
        outputs.append(attended.flatten(0, 1).to(query.dtype))
    beside = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return Move.apply(beside, layout.place, layout.source, layout.padding)[None], None


def kernel_dtype(query: torch.Tensor) -> torch.dtype:
    """float32 on a CPU, where the backward pass of the kernel is slower in bfloat16 even with
    bfloat16 in hardware.
    """
    return torch.float32 if query.device.type == "cpu" else query.dtype


@dataclass(frozen=True)
class Group:
    """Examples that share one kernel call, padded on the right to ``T``.

    Attributes:
        shape: ``(num_examples, T)``.
        source: which packed position each place shows, ``(num_examples * T,)``.
        place: the place of each packed position, ``(N,)``; 0 for those of other groups.
    """

    shape: tuple[int, int]
    source: torch.Tensor
    place: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """All groups behind each other: where each packed position lies among ``P`` places.

    Attributes:
        groups: the groups, in the order of their places.
        place: ``(N,)``, the place of each packed position.
        source: ``(P,)``, the packed position of each place, any for padding.
        padding: the places that show nothing.
    """

    groups: list[Group]
    place: torch.Tensor
    source: torch.Tensor
    padding: torch.Tensor


def lay_out(cu_seq_lens: torch.Tensor) -> Layout:
    """Sort examples into groups of lengths within a factor of two.

    Padding stands on the right, where a causal kernel never lets a real position look.
    """
    starts, lengths = cu_seq_lens[:-1].long(), cu_seq_lens.diff().long()
    size = torch.ceil(torch.log2(lengths.double())).clamp(min=5)  # all up to 32 share a group
    place = torch.zeros(int(cu_seq_lens[-1]), dtype=torch.long, device=cu_seq_lens.device)
    parts, num_places = [], 0
    for one in size.unique():
        chosen = (size == one).nonzero().squeeze(-1)
        column = torch.arange(int(lengths[chosen].max()), device=cu_seq_lens.device)
        real = (column < lengths[chosen, None]).flatten()
        source = (starts[chosen, None] + column).flatten()
        here = real.nonzero().squeeze(-1)
        place[source[here]] = here + num_places
        parts.append(((len(chosen), len(column)), source, real, num_places))
        num_places += len(real)
    real = torch.cat([part[2] for part in parts])
    source = torch.cat([part[1] for part in parts]).masked_fill(~real, 0)
    groups = [
        Group(shape, source[first : first + len(inside)], _within(place, first, len(inside), parts))
        for shape, _, inside, first in parts
    ]
    return Layout(groups, place, source, (~real).nonzero().squeeze(-1))


def _within(place: torch.Tensor, first: int, size: int, parts: list) -> torch.Tensor:
    """Places counted from a group's first one; -1 for positions of other groups."""
    if len(parts) == 1:
        return place
    inside = (place >= first) & (place < first + size)
    return (place - first).masked_fill(~inside, -1)


class Move(torch.autograd.Function):
    """``x[index]`` along the first dimension, whose gradient is ``grad[back]``: two plain copies.

    PyTorch's own gradient of indexing adds up repeated indices one by one; here each position is
    shown once, so that the gradient is a move in the other direction.
    """

    @staticmethod
    def forward(ctx, x, index, back, padding):
        """``x`` (N, ...) → (len(index), ...); ``padding``: rows of ``x`` that no index shows."""
        ctx.back, ctx.padding = back, padding
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        outside = ctx.padding
        if outside is None and (ctx.back < 0).any():
            outside = (ctx.back < 0).nonzero().squeeze(-1)
        moved = grad.index_select(0, ctx.back.clamp(min=0))
        if outside is not None and len(outside):
            moved.index_fill_(0, outside, 0)
        return moved, None, None, None


def _window_mask(query: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """``(1, 1, T, T)`` mask of a sliding window, None where the examples fit into it."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=query.device)
    distance = position[:, None] - position[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


def use_packed_attention(model) -> bool:
    """Let a model attend within packed examples.

    Returns:
        Whether the model can; False leaves it as it was, with transformers' own packed mask.
    """
    if model.config._attn_implementation.startswith("flash_attention"):
        return True
    if model.config._attn_implementation not in ("sdpa", PACKED_SDPA):
        return False
    AttentionInterface.register(PACKED_SDPA, packed_sdpa)
    AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
    model.set_attn_implementation(PACKED_SDPA)
    return model.config._attn_implementation == PACKED_SDPA


# A 4-D mask is handed through by transformers as it is: nothing of size (N, N) is built.
def no_mask(device: torch.device) -> torch.Tensor:
    """The mask to pass beside ``cu_seq_lens_q``; :func:`packed_sdpa` never looks at it."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
