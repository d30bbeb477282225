"""A merged model → a folder that stands alone."""

from __future__ import annotations

from pathlib import Path

from tinyllm.tokenizer_files import save_tokenizer
from tinyllm.whole_folder import whole_folder


def save_merged(model, tokenizer, target: Path) -> None:
    """Write a merged model and its tokenizer; the folder appears complete or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    with whole_folder(target) as scratch:
        model.save_pretrained(scratch)
        save_tokenizer(tokenizer, scratch)
