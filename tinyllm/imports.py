"""Importing libraries without Python's garbage collector, which would walk over all of it again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """No collection in a block that imports, and none of what it made ever after.

    Functions, classes and modules live as long as the program; a fifth of the time to import
    transformers was spent looking for garbage among them.  Documented for `gc.freeze
    <https://docs.python.org/3/library/gc.html#gc.freeze>`_.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
