"""Memory in large pages: with small ones, finding them takes a good part of a pass over a model."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch

CHUNK = 32 * 1024**2
ALIGNED = 64  # bytes of a cache line


def large_pages(size: int) -> mmap.mmap:
    """Memory of our own in large pages, where the system has them; shared memory seldom gets any."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    chunk = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        chunk.madvise(mmap.MADV_HUGEPAGE)
    return chunk


class Pages:
    """Keeps copies of tensors, one after another in the order in which they come."""

    def __init__(self) -> None:
        self.chunk: mmap.mmap | None = None
        self.used = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same tensor, here; its memory lives as long as it does."""
        size = -(-tensor.numel() * tensor.element_size() // ALIGNED) * ALIGNED
        if self.chunk is None or self.used + size > len(self.chunk):
            self.chunk, self.used = large_pages(max(CHUNK, size)), 0
        place = torch.frombuffer(
            self.chunk, dtype=tensor.dtype, count=tensor.numel(), offset=self.used
        )
        self.used += size
        return place.view(tensor.shape).copy_(tensor)
