"""A trained model and its data → numbers: everything measured twice, without and with the training.

Both sides see the same weights of the base, the same rows and the same questions.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyllm.base import context_length
from tinyllm.chat_format import IGNORE_INDEX
from tinyllm.data import Data
from tinyllm.errors import UserError
from tinyllm.examples import Examples
from tinyllm.generate import stop_ids
from tinyllm.report.base_side import without_training
from tinyllm.report.replies import Question, questions_of, reply_to_all, user_questions
from tinyllm.report.rows import Row, RowMeasures, measure_rows, with_other_question
from tinyllm.report.settings import read_prompts
from tinyllm.report.statistics import paired_difference
from tinyllm.settings import Settings

PROBE_FILE = Path(__file__).parents[2] / "data" / "probe" / "general_zh.txt"
SAMPLE_SEED = 0
TRAIN_ROWS = 64  # of the training rows, to see how much better they are known than held-out ones
PAIRED_ROWS = 64  # of the held-out rows, measured behind another row's question as well
CHECKED_ROWS = 2000  # training rows whose mask is looked at
PROBE_TOKENS = 256
MAX_REPLY_TOKENS = 96


@dataclass
class Probe:
    """What is measured, on both sides alike."""

    rows: dict[str, list[Row]]
    held_out_questions: list[Question]
    user_questions: list[Question]
    answered_by: list[int]  # the held-out row whose answer each mismatched row carries


@dataclass
class Side:
    """What one of the two models makes of a probe."""

    measures: dict[str, RowMeasures]
    replies: list[dict]


def measure(model, tokenizer, chat_format, settings: Settings, data: Data) -> dict:
    """Measure what the training changed.

    Args:
        model: the trained model (a PeftModel, or the whole model trained), on its device.

    Returns:
        The part ``evidence`` of ``metrics.json``, as docs/report.md explains it.
    """
    started = time.monotonic()
    was_training = model.training
    model.eval()
    stops = stop_ids(model, chat_format)
    probe = make_probe(tokenizer, settings, data, context_length(model))

    def side(one) -> Side:
        measures = {name: measure_rows(one, rows, stops) for name, rows in probe.rows.items()}
        questions = probe.held_out_questions + probe.user_questions
        replies = reply_to_all(one, tokenizer, chat_format, questions, MAX_REPLY_TOKENS)
        return Side(measures, replies)

    with without_training(model, settings.base, tokenizer) as base:
        off = side(base)
    on = side(model)
    model.train(was_training)
    evidence = compare_sides(probe, off, on)
    evidence["supervision"] = check_supervision(data.train, stops, role_markers(chat_format))
    evidence["num_held_out"] = len(data.held_out) if data.held_out is not None else 0
    evidence["num_train"] = len(data.train)
    evidence["num_also_trained"] = data.ledger.overlap.number
    return evidence | {"seconds": time.monotonic() - started}


def make_probe(tokenizer, settings: Settings, data: Data, context: int) -> Probe:
    """Choose the rows and questions; the same settings and data choose the same."""
    held_out = sample(data.held_out, settings.run.report_rows) if data.held_out is not None else []
    mismatched = with_other_question(held_out[:PAIRED_ROWS], context)
    rows = {
        "held_out": held_out,
        "train": sample(data.train, TRAIN_ROWS),
        "mismatched": [row for _, row in mismatched],
        "general": general_rows(tokenizer, min(PROBE_TOKENS, context)),
    }
    prompt = settings.data.system_prompt
    own = read_prompts(settings.run.probe_prompts) if settings.run.probe_prompts else []
    return Probe(
        {name: part for name, part in rows.items() if part},
        questions_of(data.sample_records, prompt, settings.run.report_replies),
        user_questions(own, prompt),
        [number for number, _ in mismatched],
    )


def sample(examples: Examples, limit: int) -> list[Row]:
    """At most ``limit`` examples, drawn by a fixed seed and mixed."""
    order = np.random.default_rng(SAMPLE_SEED).permutation(len(examples))[:limit]
    return [examples[int(i)] for i in order]


def general_rows(tokenizer, max_tokens: int) -> list[Row]:
    """The general passages as rows in which every id but the first is supervised.

    Raises:
        UserError: the file with the passages is missing.
    """
    try:
        text = PROBE_FILE.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{PROBE_FILE}: cannot be read: {error.strerror}; restore it, or use --report False"
        ) from error
    rows = []
    for passage in text.split("\n\n"):
        ids = np.array(tokenizer(passage.strip()).input_ids[:max_tokens], dtype=np.int64)
        if len(ids) > 1:
            rows.append({"input_ids": ids, "labels": np.concatenate([[IGNORE_INDEX], ids[1:]])})
    return rows


def compare_sides(probe: Probe, off: Side, on: Side) -> dict:
    """The two sides beside each other."""
    parts: dict = {name: None for name in ("held_out", "train", "general", "question")}
    for name in ("held_out", "train", "general"):
        if name in probe.rows:
            parts[name] = _both(off.measures[name], on.measures[name])
    if "mismatched" in probe.rows:
        parts["question"] = {
            "rows": len(probe.answered_by),
            "off": _question_gain(off.measures, probe.answered_by),
            "on": _question_gain(on.measures, probe.answered_by),
        }
    number = len(probe.held_out_questions)
    parts["stop"] = {
        "replies": number,
        "off": _stopped(off.replies[:number]),
        "on": _stopped(on.replies[:number]),
    }
    questions = probe.held_out_questions + probe.user_questions
    parts["replies"] = [
        {
            "source": "data" if place < number else "user",
            "question": question.text, "gold": question.gold, "off": before, "on": after,
        }
        for place, (question, before, after)
        in enumerate(zip(questions, off.replies, on.replies, strict=True))
    ]  # fmt: skip
    return parts


def _both(off: RowMeasures, on: RowMeasures) -> dict:
    return {
        "rows": len(off.count),
        "tokens": int(off.count.sum()),
        "off": off.summary(),
        "on": on.summary(),
        "drop": paired_difference(off.loss, on.loss, off.count),
        "changed": bool((off.loss != on.loss).any()),
    }


def _question_gain(measures: dict[str, RowMeasures], answered_by: list[int]) -> dict:
    """How much more probable answers are behind their own question than behind another, in nats."""
    matched = measures["held_out"].last_loss[answered_by]
    return paired_difference(measures["mismatched"].loss, matched, measures["mismatched"].count)


def _stopped(replies: list[dict]) -> float | None:
    return sum(reply["stopped"] for reply in replies) / len(replies) if replies else None


def role_markers(chat_format) -> set[int]:
    """Ids of special tokens that stand around a conversation's turns and are never an answer's."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    encoded = chat_format.encode(turns)
    pairs = list(zip(encoded.input_ids, encoded.supervised, strict=True))
    special = set(chat_format.text.tokenizer.all_special_ids)
    learned = {i for i, supervised in pairs if supervised}
    return {i for i, supervised in pairs if not supervised and i in special} - learned


def check_supervision(train: Examples, stops: list[int], markers: set[int]) -> dict:
    """Look at what the training rows teach, by their labels alone.

    Returns:
        ``rows`` looked at, the ``share`` of their ids that is learned, ``with_stop`` and
        ``with_markers``: the shares of rows that teach an end token, and a role marker.
    """
    rows = sample(train, CHECKED_ROWS)
    learned = [row["labels"][row["labels"] != IGNORE_INDEX] for row in rows]
    return {
        "rows": len(rows),
        "share": sum(map(len, learned)) / sum(len(row["labels"]) for row in rows),
        "with_stop": float(np.mean([np.isin(ids, stops).any() for ids in learned])),
        "with_markers": float(np.mean([np.isin(ids, list(markers)).any() for ids in learned])),
    }
