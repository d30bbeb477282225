"""Settings → training and held-out examples; what became of every row is counted and printed.

Two readings: the first checks every row and decides what becomes of it (row_index.py), the second
encodes (encoding.py).  Large data is kept encoded (encoding_cache.py).
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tinyllm.encoding import Encoder, LengthRules
from tinyllm.encoding_cache import CACHE_FROM_BYTES, EncodingCache, cache_key, stamps, total_bytes
from tinyllm.errors import UserError
from tinyllm.examples import Examples
from tinyllm.formats import RowRules
from tinyllm.ledger import Ledger
from tinyllm.ledger_table import table
from tinyllm.records import Record, Source, find_sources, split_weight
from tinyllm.row_encoder import RowEncoder
from tinyllm.row_index import (
    HELD_OUT,
    RowIndex,
    copies,
    count_overlap,
    count_repeats,
    hold_out,
    index_rows,
)
from tinyllm.settings import DataSettings

SAY_SECONDS = 5


@dataclass
class Data:
    """Everything that a run learns from and is measured by.

    Attributes:
        ledger: what became of every row.
        sample_records: the first held-out records (the first training records, if none is held out).
        origin: where the examples come from, when that is worth saying.
    """

    train: Examples
    held_out: Examples | None
    ledger: Ledger
    sample_records: list[Record]
    origin: str = ""

    @property
    def summary(self) -> dict:
        """The counts that go into ``run.json``."""
        ledger, train = self.ledger, self.ledger.train
        return {
            "num_rows_read": ledger.total("num_read"),
            "num_rows_refused": ledger.total("refused"),
            "num_shortened": ledger.total("shortened"),
            "num_dropped": ledger.total("dropped"),
            "num_duplicates": ledger.duplicates.number,
            "num_conflicting_questions": ledger.conflicts.number,
            "num_held_out_also_trained": ledger.overlap.number,
            "num_examples": train.num_examples,
            "num_held_out": ledger.held_out.num_examples if ledger.held_out else 0,
            "num_tokens": train.num_tokens,
            "num_supervised": train.num_supervised,
            "max_tokens": train.length_max,
        }


@dataclass(frozen=True)
class Files:
    """Which files are read: to train on, to evaluate on (or none, and a share is split off)."""

    train: list[Source]
    held_out: list[Source]
    split: bool
    others: list[str]

    @property
    def all(self) -> list[Source]:
        return [*self.train, *self.held_out]


def load_data(
    settings: DataSettings, chat_format, max_length: int, seed: int, progress: bool = False
) -> Data:
    """Read, check and encode the training and the held-out rows, or take them from the cache.

    Args:
        max_length: most tokens of an example.
        seed: chooses the rows that are held out, and those that a weight like 0.5 keeps.
        progress: show bars for what takes long.

    Raises:
        UserError: whatever is wrong with a file or a row.
    """
    started = time.monotonic()
    files = find_files(settings)
    if settings.data_cache == "none" or total_bytes(files.all) < CACHE_FROM_BYTES:
        data = prepare(settings, files, chat_format, max_length, seed, None, progress)
        seconds = time.monotonic() - started
        data.origin = f"prepared in {seconds:.0f} s" if seconds > SAY_SECONDS else ""
        return data
    cache, before = _cache(settings, files, chat_format, max_length, seed), stamps(files.all)
    if (data := _load(cache)) is not None:
        data.origin = f"from the cache {cache.entry}, in {time.monotonic() - started:.1f} s"
        return data
    with cache.writing() as scratch:
        data = prepare(settings, files, chat_format, max_length, seed, scratch, progress)
        _save(cache, scratch, data)
        if stamps(files.all) != before:
            raise UserError("a data file has changed while it was being read; start again")
    data = _load(cache) or data
    data.origin = f"prepared in {time.monotonic() - started:.0f} s, kept in {cache.entry}"
    return data


def find_files(settings: DataSettings) -> Files:
    """Find all data files; ``auto`` held-out rows are the folder beside, or a share."""
    train, others = find_sources(settings.dataset)
    if settings.eval_dataset == ["none"]:
        return Files(train, [], False, others)
    paths = settings.eval_dataset
    if paths == ["auto"]:
        beside = held_out_beside(settings.dataset)
        if beside is None:
            return Files(train, [], True, others)
        paths = [str(beside)]
    held_out, more = find_sources(paths)
    if any(source.weight != 1 for source in held_out):
        raise UserError("--eval_dataset: a weight makes no sense here, every row is evaluated once")
    return Files(train, held_out, False, others + more)


def held_out_beside(dataset: list[str]) -> Path | None:
    """The folder ``…eval`` that lies beside a training folder ``…train``, if there is one."""
    if len(dataset) != 1:
        return None
    folder = Path(split_weight(dataset[0])[0])
    if not folder.is_dir() or "train" not in folder.name:
        return None
    beside = folder.with_name(folder.name.replace("train", "eval"))
    return beside if beside.is_dir() else None


def prepare(
    settings: DataSettings, files: Files, chat_format, max_length: int, seed: int,
    folder: Path | None, progress: bool,
) -> Data:  # fmt: skip
    """Read everything; the examples are kept in memory or in files of ``folder``."""
    rules = RowRules(settings.column_names, settings.train_on)
    train = index_rows(files.train, rules, "train", settings.bad_rows, progress)
    held_out = (index_rows(files.held_out, rules, "held-out", settings.bad_rows, progress)
                if files.held_out else None)  # fmt: skip
    length_rules = LengthRules(max_length, settings.overlong)
    encoder = Encoder(chat_format, settings.system_prompt, length_rules)
    rows = RowEncoder(encoder, rules, settings.bad_rows, folder, progress)
    try:
        rows.encode(train, fates(train, settings.eval_share if files.split else 0, seed))
        if held_out is not None:
            rows.encode(held_out, np.full(len(held_out), HELD_OUT))
        examples = rows.finish()
    finally:
        rows.close()
    ledger = Ledger([*train.ledgers, *(held_out.ledgers if held_out else [])], max_length,
                    *rows.sizes, other_files=files.others)  # fmt: skip
    ledger.duplicates, ledger.conflicts = count_repeats(train)
    if held_out is not None:
        count_repeats(held_out)
        ledger.overlap = count_overlap(held_out, train)
    return Data(*examples, ledger, rows.samples)


def fates(index: RowIndex, eval_share: float, seed: int) -> np.ndarray:
    """What becomes of each row, ``(num_rows,)``: HELD_OUT, or how often an epoch sees it."""
    fate = copies(index, seed)
    if eval_share:
        fate[hold_out(index, eval_share, seed)] = HELD_OUT
    return fate


def _cache(
    settings: DataSettings, files: Files, chat_format, max_length: int, seed: int
) -> EncodingCache:
    depends = {**asdict(settings), "max_length": max_length, "seed": seed, "others": files.others}
    depends.pop("data_cache")
    return EncodingCache(Path(settings.data_cache), cache_key(chat_format, files.all, depends))


def _save(cache: EncodingCache, scratch: Path, data: Data) -> None:
    samples = [asdict(record) for record in data.sample_records]
    content = {"ledger": data.ledger.to_json(), "samples": samples}
    cache.finish(scratch, {"train": data.train, "held_out": data.held_out}, content)


def _load(cache: EncodingCache) -> Data | None:
    found = cache.load()
    if found is None:
        return None
    parts, content = found
    samples = [Record(**sample) for sample in content["samples"]]
    return Data(parts["train"], parts["held_out"], Ledger.from_json(content["ledger"]), samples)


def describe(data: Data) -> str:
    """The ledger's table, for the start of a run."""
    return table(data.ledger) + (f"\n  {data.origin}" if data.origin else "")


def require_held_out(data: Data, eval_strategy: str) -> None:
    """Raise a UserError when an evaluation is asked for and there is nothing to evaluate on."""
    if data.held_out is None and str(eval_strategy) not in ("no", "IntervalStrategy.NO"):
        raise UserError("--eval_strategy needs held-out rows: give --eval_dataset, or set it to no")
