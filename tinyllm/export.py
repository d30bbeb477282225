"""A merged model → a folder that stands alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tinyllm.errors import UserError


def save_merged(model, tokenizer, target: Path) -> None:
    """Write a merged model and its tokenizer; the folder appears complete or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    scratch = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        scratch.mkdir(parents=True)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        if target.is_dir():
            target.rmdir()
        scratch.rename(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
