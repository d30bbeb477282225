"""Settings → training and held-out examples; what became of every row is counted and printed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from tinyllm.errors import UserError
from tinyllm.examples import EncodingCount, Examples, encode_records
from tinyllm.records import Record, Records, read_records
from tinyllm.settings import DataSettings


@dataclass
class Data:
    """Everything that a run learns from and is measured by."""

    train: Examples
    held_out: Examples | None
    train_count: EncodingCount
    held_out_records: list[Record]
    read: Records

    @property
    def summary(self) -> dict:
        """The counts that go into ``run.json``."""
        return {
            "num_rows_read": sum(f.num_read for f in self.read.files),
            "num_rows_refused": len(self.read.refused),
            "num_shortened": len(self.train_count.shortened),
            "num_dropped": len(self.train_count.dropped),
            "num_examples": len(self.train),
            "num_held_out": len(self.held_out) if self.held_out is not None else 0,
            "num_tokens": len(self.train.input_ids),
            "num_supervised": self.train.num_supervised,
            "max_tokens": int(self.train.lengths.max()),
        }


def load_data(settings: DataSettings, chat_format, max_length: int, seed: int) -> Data:
    """Read, check and encode the training and the held-out rows.

    Args:
        max_length: most tokens of an example.
        seed: chooses the rows that are held out when a share of the training rows is.

    Raises:
        UserError: whatever is wrong with a file or a row.
    """
    read = read_records(settings.dataset, settings.bad_rows)
    training, held_out = _split(settings, read.records, seed)
    train, count = encode_records(
        training, chat_format, settings.system_prompt, max_length, settings.overlong
    )
    held = None
    if held_out:
        held, _ = encode_records(
            held_out, chat_format, settings.system_prompt, max_length, settings.overlong
        )
    return Data(train, held, count, held_out, read)


def _split(settings: DataSettings, records: list[Record], seed: int):
    """``(training records, held-out records)``."""
    if settings.eval_dataset == ["none"]:
        return records, []
    paths = settings.eval_dataset
    if paths == ["auto"]:
        beside = held_out_beside(settings.dataset)
        if beside is None:
            return hold_out(records, settings.eval_share, seed)
        paths = [str(beside)]
    return records, read_records(paths, settings.bad_rows).records


def held_out_beside(dataset: list[str]) -> Path | None:
    """The folder ``…eval`` that lies beside a training folder ``…train``, if there is one."""
    if len(dataset) != 1:
        return None
    folder = Path(dataset[0])
    if not folder.is_dir() or "train" not in folder.name:
        return None
    beside = folder.with_name(folder.name.replace("train", "eval"))
    return beside if beside.is_dir() else None


def hold_out(records: list[Record], share: float, seed: int):
    """Choose a share of the records at random; at least one, and none of a single record."""
    if len(records) < 2:
        return records, []
    number = min(max(1, round(len(records) * share)), len(records) - 1)
    chosen = set(random.Random(seed).sample(range(len(records)), number))
    return (
        [r for i, r in enumerate(records) if i not in chosen],
        [r for i, r in enumerate(records) if i in chosen],
    )


def describe(data: Data) -> str:
    """The counts in a few lines, for the start of a run."""
    s, lines = data.summary, []
    for file in data.read.files:
        refused = f", {len(file.refused)} refused" if file.refused else ""
        lines.append(f"  {file.file}: {file.num_read:,} rows, {file.num_kept:,} kept{refused}")
        lines += [f"    line {line}: {why}" for line, why in file.refused[:10]]
    for what, where in (
        ("shortened", data.train_count.shortened),
        ("dropped", data.train_count.dropped),
    ):
        if where:
            lines.append(f"  {len(where)} examples over max_length {what}, first {where[0]}")
    share = 100 * s["num_supervised"] / s["num_tokens"]
    lines.append(
        f"  {s['num_examples']:,} examples to train on, {s['num_held_out']:,} held out; "
        f"{s['num_tokens']:,} tokens, {share:.0f} % of them supervised; longest {s['max_tokens']}"
    )
    return "\n".join(lines)


def require_held_out(data: Data, eval_strategy: str) -> None:
    """Raise a UserError when an evaluation is asked for and there is nothing to evaluate on."""
    if data.held_out is None and str(eval_strategy) not in ("no", "IntervalStrategy.NO"):
        raise UserError("--eval_strategy needs held-out rows: give --eval_dataset, or set it to no")
