"""Examples → the rows that they were made from, by reading the data files once more.

Training carries only ids; when a step goes wrong its rows are looked up by their content, so that
nothing has to be kept for it while all is well.
"""

from __future__ import annotations

import numpy as np

SHOWN_ROWS = 20


def ids_of(batch) -> list[bytes]:
    """The ids of each example of a ragged batch, as bytes of int32."""
    ids = batch["input_ids"].cpu().numpy().astype(np.int32)
    ends = np.cumsum(batch["lengths"].cpu().numpy())
    return [part.tobytes() for part in np.split(ids, ends[:-1])]


def find_rows(settings, tokenizer, max_length: int, wanted: list[bytes]) -> list[str]:
    """``file:line`` of the first row that gives each example, "?" when no row does any more.

    Args:
        settings: DataSettings.
        wanted: what :func:`ids_of` gives.
    """
    from tinyllm.chat_format import chat_format_of
    from tinyllm.data import find_files
    from tinyllm.encoding import Encoder, LengthRules
    from tinyllm.formats import RowRules
    from tinyllm.ledger import FileLedger
    from tinyllm.printable import one_line
    from tinyllm.records import read_records

    rules = RowRules(settings.column_names, settings.train_on)
    length_rules = LengthRules(max_length, settings.overlong)
    encoder = Encoder(chat_format_of(tokenizer), settings.system_prompt, length_rules)
    found: dict[bytes, str] = {}
    for source in find_files(settings).train:
        records = read_records(source.path, rules, FileLedger(one_line(source.path)))
        for record, outcome in encoder.encode_all(records):
            if outcome.ids is not None:
                key = outcome.ids.astype(np.int32).tobytes()
                if key in wanted:
                    found.setdefault(key, record.where)
        if len(found) == len(set(wanted)):
            break
    return [found.get(key, "?") for key in wanted]


def rows_text(rows: list[str]) -> str:
    """``a.jsonl:3, a.jsonl:9``; beyond twenty they are counted."""
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    return ", ".join(rows[:SHOWN_ROWS]) + more
