"""Rows that adapters are trained on, read by the base as well at the end of its own training.

MiniCPM mixes such rows into the decay of the rate (Hu et al. 2024, arXiv:2404.06395, section 5).  What names
the maker is left to the adapters, so that a run still shows what it taught.
"""

import logging
from pathlib import Path

from tinyllm.errors import UserError
from tinyllm.formats import RowRules
from tinyllm.ledger import FileLedger
from tinyllm.pretrain.extract import Document, document, render_chat, text_id
from tinyllm.pretrain.vocabulary import SPECIAL_TOKENS
from tinyllm.records import Record, bad_rows_message, find_sources, read_records

log = logging.getLogger(__name__)


def instruction_documents(paths: str, without: str) -> list[Document]:
    """The rows of data files or folders (comma-separated) in the chat format.  Left out, and counted, are those that
    say `without`, that have turns which are not to be learned, or that spell a special token.

    Raises:
        UserError: a row that cannot be read, or no row is left.
    """
    if not paths:
        return []
    records = [record for path in files_of(paths) for record in records_of(path)]
    reasons = [reason_against(record, without) for record in records]
    kept = [record for record, reason in zip(records, reasons, strict=True) if not reason]
    counts = ", ".join(
        f"{reasons.count(r)} left out that {r}" for r in dict.fromkeys(filter(None, reasons))
    )
    log.info("instructions: %d rows%s", len(records), f", {counts}" if counts else "")
    if not kept:
        raise UserError(f"instructions {paths}: none of {len(records)} rows is left: {counts}")
    texts = [render_chat(record.messages, i % 2 == 1) for i, record in enumerate(kept)]
    return [document("instructions", text_id(text), text) for text in texts]


def files_of(paths: str) -> list[Path]:
    """The data files behind the setting.

    Raises:
        UserError: one is missing, or has a weight.
    """
    sources, others = find_sources(paths.split(","))
    if weighted := [source.path for source in sources if source.weight != 1]:
        raise UserError(f"instructions: {weighted[0]} has a weight; all rows weigh the same here")
    if others:
        log.info("instructions: not read, no data files: %s", ", ".join(others))
    return [source.path for source in sources]


def records_of(path: Path) -> list[Record]:
    """All rows of a file.

    Raises:
        UserError: naming the rows that cannot be used.
    """
    ledger = FileLedger(str(path))
    records = list(read_records(path, RowRules(), ledger))
    if ledger.refused:
        raise UserError(bad_rows_message([ledger]))
    return records


def reason_against(record: Record, without: str) -> str:
    """Why the base shall not read a row; empty if it may."""
    text = "\n".join(message["content"] for message in record.messages)
    if without and without in text:
        return f"say {without!r}"
    if not all(message.get("train", True) for message in record.messages):
        return "have turns which are not to be learned"
    return "spell a special token" if any(token in text for token in SPECIAL_TOKENS) else ""
