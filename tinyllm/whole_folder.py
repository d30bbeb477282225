"""A folder that appears complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinyllm.errors import UserError


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder beside ``target`` to fill; afterwards it takes the target's place.

    An empty folder that stands there is replaced.  On any error nothing is left behind.

    Raises:
        UserError: the folder cannot be written.
    """
    scratch = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        if target.is_dir():
            target.rmdir()
        scratch.rename(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
