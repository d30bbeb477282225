"""Attention over packed examples: one row holds many, none sees another, nothing is padded.

Transformers builds a ``(N, N)`` mask for a packed row, so that the cost grows with the square of
the whole micro-batch.  Here each example attends alone, with PyTorch's causal kernel and no mask;
the model is told by ``cu_seq_lens_q``, the same keyword that flash-attention kernels take.
"""

from __future__ import annotations

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
    output = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    for rows in _groups(cu_seq_lens_q):
        q, k, v = (_pad(states, rows) for states in (query, key, value))
        attended = sdpa_attention_forward(module, q, k, v, _window_mask(q, window), **kwargs)[0]
        real = rows >= 0
        output = output.index_put((rows[real],), attended[real])
    return output[None], None


def _groups(cu_seq_lens: torch.Tensor) -> list[torch.Tensor]:
    """Group examples of similar length, so that one kernel call serves many with little padding.

    Returns:
        For each group the positions of its examples' ids, ``(num_examples, T)``, -1 for padding on
        the right, which a causal kernel never lets a real position look at.
    """
    starts, lengths = cu_seq_lens[:-1].long(), cu_seq_lens.diff().long()
    size = torch.ceil(torch.log2(lengths)).clamp(min=5)  # all up to 32 share a group
    groups = []
    for one in size.unique():
        chosen = (size == one).nonzero().squeeze(-1)
        column = torch.arange(int(lengths[chosen].max()), device=cu_seq_lens.device)
        rows = starts[chosen, None] + column
        groups.append(rows.masked_fill(column >= lengths[chosen, None], -1))
    return groups


def _pad(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``(1, heads, N, head_dim)`` → ``(num_examples, heads, T, head_dim)``."""
    return states[0].transpose(0, 1)[rows.clamp(min=0)].transpose(1, 2)


def _window_mask(query: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """``(1, 1, T, T)`` mask of a sliding window, None where the example fits into it."""
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
    if model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(PACKED_SDPA, packed_sdpa)
    AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
    model.set_attn_implementation(PACKED_SDPA)
    return model.config._attn_implementation == PACKED_SDPA


# A 4-D mask is handed through by transformers as it is: nothing of size (N, N) is built.
def no_mask(device: torch.device) -> torch.Tensor:
    """The mask to pass beside ``cu_seq_lens_q``; :func:`packed_sdpa` never looks at it."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
