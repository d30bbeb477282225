"""Causal attention as two batched matrix products, for short examples in bfloat16 on a CPU.

PyTorch's CPU kernel never holds all shares, which pays for long examples, but its backward pass is
slower than the products: forward and backward of 16 examples of 48 tokens take 1.1 ms by products
and 2.4 ms by the kernel in float32, its faster form; 4 of 192 tokens, 2.0 and 5.3 ms
(`python benchmarks/attention_paths.py`).  Queries that share a key head are one product.

Scores and shares are rounded to bfloat16, as by transformers' `eager` attention in that type; the output's
relative error is 0.3 % for 48 tokens, and 0.2 % by the kernel in float32.
"""

from __future__ import annotations

import torch

from tinyllm.native_bf16 import cpu_multiplies_bf16

MOST_SHARES = 1 << 22  # elements of a layer, 8 MiB that the backward pass keeps


def suits_type(query: torch.Tensor) -> bool:
    """Whether products may be the faster way for queries of this type."""
    on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    return on_cpu and cpu_multiplies_bf16()


def suits(query: torch.Tensor, dropout: float) -> bool:
    """Whether products are the faster way for ``query`` ``(B, T, num_heads, head_dim)``."""
    return (
        suits_type(query)
        and query.shape[0] * query.shape[2] * query.shape[1] ** 2 <= MOST_SHARES
        and not dropout
    )


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Each position sees itself and what is before it, in a sliding window at most ``window`` positions.

    Args:
        query: ``(B, T, num_heads, head_dim)``.
        key: ``(B, T, num_key_value_heads, head_dim)``, as ``value``.

    Returns:
        ``(B, T, num_heads, head_dim)``.
    """
    batch, length, num_heads, dim = query.shape
    groups = key.shape[2]
    shared = num_heads // groups
    query = query.view(batch, length, groups, shared, dim).permute(0, 2, 3, 1, 4)
    query = query.reshape(batch * groups, shared * length, dim)
    key = key.permute(0, 2, 3, 1).reshape(batch * groups, dim, length)
    value = value.permute(0, 2, 1, 3).reshape(batch * groups, length, dim)
    hidden = unseen(length, window, query.dtype).repeat(shared, 1)
    shares = torch.baddbmm(hidden, query, key, alpha=scale).softmax(-1)
    mixed = (shares @ value).view(batch, groups, shared, length, dim)
    return mixed.permute(0, 3, 1, 2, 4).reshape(batch, length, num_heads, dim)


def unseen(length: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """``(T, T)``: minus infinity where a row's position does not see a column's, else 0."""
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]
    seen = (distance >= 0) & (distance < (length if window is None else window))
    return torch.zeros(length, length, dtype=dtype).masked_fill_(~seen, -float("inf"))
