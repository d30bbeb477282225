"""Importing libraries without Python's garbage collector, which would walk over all of it again and again."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """No collection in a block that imports transformers, and none of what it made ever after.

    Functions, classes and modules live as long as the program; a fifth of the time to import
    transformers was spent looking for garbage among them.  Documented for `gc.freeze
    <https://docs.python.org/3/library/gc.html#gc.freeze>`_.  Where transformers is there already nothing
    is done: what lives by then, as a model of a run before, must be collected one day.
    """
    if "transformers" in sys.modules:
        yield
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
