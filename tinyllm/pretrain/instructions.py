"""Rows that adapters are trained on, read by the base as well at the end of its own training.

MiniCPM mixes such rows into the decay of the rate (Hu et al. 2024, arXiv:2404.06395, section 5).  What names
the maker is left to the adapters, so that a run still shows what it taught.
"""

import json
import logging
from pathlib import Path

from tinyllm.errors import UserError
from tinyllm.formats import conversation_of
from tinyllm.pretrain.extract import Document, document, render_chat, text_id

log = logging.getLogger(__name__)


def instruction_documents(folder: str, without: str) -> list[Document]:
    """The rows of every `*.jsonl` of a folder in the chat format, but for those that say `without`.

    Raises:
        UserError: a row that cannot be used, or there is none.
    """
    if not folder:
        return []
    lines = [
        (path, number, line)
        for path in sorted(Path(folder).glob("*.jsonl"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    ]
    kept = [one for one in lines if not without or without not in one[2]]
    if not kept:
        raise UserError(
            f"instructions: no rows in *.jsonl of {folder}; --instructions '' uses none"
        )
    log.info(
        "instructions: %d rows, %d of them left out for %r",
        len(lines),
        len(lines) - len(kept),
        without,
    )
    return [one_document(*one, with_system=i % 2 == 1) for i, one in enumerate(kept)]


def one_document(path: Path, number: int, line: str, with_system: bool) -> Document:
    """A row as the chat format writes it; `with_system` gives one without a system turn ours."""
    try:
        messages = conversation_of(json.loads(line))
    except ValueError as error:
        raise UserError(f"{path}, line {number}: {error}") from error
    return document(
        "instructions", f"{path.stem}/{text_id(line)}", render_chat(messages, with_system)
    )
