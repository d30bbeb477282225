"""Which way of attention is faster on this CPU, for examples of which length?

    python benchmarks/attention_paths.py

Times forward and backward of one micro-batch of about 768 tokens, 6 query and 3 key heads of 64, in
bfloat16: by two batched products (tinyllm/matrix_attention.py), and by PyTorch's kernel in float32
and in bfloat16.  What is compared runs in turns; the median counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tinyllm.matrix_attention import attend

SHAPES = ((16, 48), (8, 96), (4, 192), (2, 384), (1, 768))  # examples, tokens
HEADS, GROUPS, DIM = 6, 3, 64
REPEATS = 21


def by_kernel(query, key, value, dtype: torch.dtype) -> torch.Tensor:
    """PyTorch's causal kernel in some type."""
    states = (s.transpose(1, 2).to(dtype) for s in (query, key, value))
    mixed = F.scaled_dot_product_attention(*states, is_causal=True, enable_gqa=True)
    return mixed.transpose(1, 2).to(query.dtype)


def in_turns(ways: dict[str, Callable], states: list[torch.Tensor]) -> dict[str, float]:
    """Median milliseconds of forward and backward by each way."""
    grad, taken = torch.randn_like(states[0]), {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            started = time.perf_counter()
            way(*states).backward(grad)
            taken[name].append(1e3 * (time.perf_counter() - started))
    return {name: median(times[2:]) for name, times in taken.items()}


def main() -> None:
    """Print one line a shape."""
    ways = {
        "products": lambda q, k, v: attend(q, k, v, DIM**-0.5, None),
        "kernel float32": lambda q, k, v: by_kernel(q, k, v, torch.float32),
        "kernel bfloat16": lambda q, k, v: by_kernel(q, k, v, torch.bfloat16),
    }
    print("| examples x tokens | " + " | ".join(f"{name}, ms" for name in ways) + " |")
    print("|---|" + "---:|" * len(ways))
    for batch, length in SHAPES:
        states = [
            torch.randn(batch, length, heads, DIM, dtype=torch.bfloat16).requires_grad_()
            for heads in (HEADS, GROUPS, GROUPS)
        ]
        taken = in_turns(ways, states)
        print(f"| {batch} x {length} | " + " | ".join(f"{ms:.1f}" for ms in taken.values()) + " |")


if __name__ == "__main__":
    main()
