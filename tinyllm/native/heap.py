"""What the C library does with memory that a training step frees."""

from __future__ import annotations

import ctypes

# mallopt(3): blocks up to this size come from the heap, and the heap's end is given back only above that.
MMAP_THRESHOLD, TRIM_THRESHOLD, TOP_PAD = -3, -1, -2
LARGEST_BLOCK, KEPT, PADDING = 32 * 1024**2, 256 * 1024**2, 16 * 1024**2


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next step.

    By default it gives tensors of some megabytes back to the system at once, which hands them out
    again page by page, filled with zeros.

    Returns:
        Whether there is a glibc that does so.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return False
    options = {MMAP_THRESHOLD: LARGEST_BLOCK, TRIM_THRESHOLD: KEPT, TOP_PAD: PADDING}
    return all([mallopt(option, value) for option, value in options.items()])
