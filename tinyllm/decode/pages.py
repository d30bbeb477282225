"""Memory in large pages: with small ones, finding them takes a good part of a pass over a model."""

from __future__ import annotations

import mmap

import torch

CHUNK = 32 * 1024**2
ALIGNED = 64  # bytes of a cache line


class Pages:
    """Keeps copies of tensors, one after another in the order in which they come."""

    def __init__(self) -> None:
        self.chunk: mmap.mmap | None = None
        self.used = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same tensor, here; its memory lives as long as it does."""
        size = -(-tensor.numel() * tensor.element_size() // ALIGNED) * ALIGNED
        if self.chunk is None or self.used + size > len(self.chunk):
            self.chunk, self.used = mmap.mmap(-1, max(CHUNK, size)), 0
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self.chunk.madvise(mmap.MADV_HUGEPAGE)
        place = torch.frombuffer(
            self.chunk, dtype=tensor.dtype, count=tensor.numel(), offset=self.used
        )
        self.used += size
        return place.view(tensor.shape).copy_(tensor)
