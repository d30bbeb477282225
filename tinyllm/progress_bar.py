"""A bar for work that takes long; work that does not shows nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

QUIET_SECONDS = 2


@contextmanager
def counted(what: str, total: int | None, shown: bool) -> Iterator[Callable[[int], object]]:
    """Give a function that counts rows done; the bar appears after two seconds."""
    # a log file gets a line now and then, a terminal a living bar
    pace = 0.2 if sys.stderr.isatty() else 15
    with tqdm(
        desc=what, total=total, unit=" rows", unit_scale=True, disable=not shown,
        delay=QUIET_SECONDS, mininterval=pace, maxinterval=pace, dynamic_ncols=True, leave=False,
    ) as bar:  # fmt: skip
        yield bar.update
