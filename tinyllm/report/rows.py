"""Examples → what a model makes of each of them: loss, hits, and whether it would stop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tinyllm.attention import PACKED_SDPA
from tinyllm.batches import Batch, collate, model_inputs, split, targets
from tinyllm.chat_format import IGNORE_INDEX

MAX_TOKENS = 1024  # of a packed row
MAX_LOGITS = 30_000_000  # of a packed row, all of them in float32

Row = dict[str, np.ndarray]  # input_ids and labels, each (T,)


@dataclass
class RowMeasures:
    """Sums over the supervised tokens of each row, each ``(num_rows,)``.

    Attributes:
        loss: cross-entropy in nats.
        count: supervised tokens.
        hits: tokens that were the likeliest of all.
        last_loss: the loss over the last supervised stretch alone, usually the last answer.
        last_count: its tokens.
        stop: mean probability of an end token where the answers end.
    """

    loss: np.ndarray
    count: np.ndarray
    hits: np.ndarray
    last_loss: np.ndarray
    last_count: np.ndarray
    stop: np.ndarray

    def summary(self) -> dict:
        """Loss, perplexity, token accuracy and stop probability over all rows."""
        loss = float(self.loss.sum() / self.count.sum())
        return {
            "loss": loss,
            "perplexity": float(np.exp(min(loss, 700.0))),
            "token_accuracy": float(self.hits.sum() / self.count.sum()),
            "stop_probability": float(self.stop.mean()),
        }


@torch.inference_mode()
def measure_rows(model, rows: list[Row], stops: list[int]) -> RowMeasures:
    """Measure every row in packed batches, the head only where something is measured.

    Args:
        model: a causal model or a PeftModel, in evaluation mode.
        rows: examples as :class:`tinyllm.examples.Examples` gives them, at least one.
        stops: ids that end an answer.
    """
    config = model.config.get_text_config()
    packed = model.config._attn_implementation == PACKED_SDPA
    max_tokens = max(128, min(MAX_TOKENS, MAX_LOGITS // config.vocab_size))
    if getattr(model, "one_by_one", False):
        max_tokens = 1  # a base whose examples would see each other (packing_check.py)
    device = next(model.parameters()).device
    parts = [
        _measure({name: part.to(device) for name, part in batch.items()}, model, stops, packed)
        for batch in split(collate(rows), max_tokens)
    ]
    sums = [torch.cat(column).double().cpu().numpy() for column in zip(*parts, strict=True)]
    return RowMeasures(*sums)


def _measure(batch: Batch, model, stops: list[int], packed: bool) -> tuple[torch.Tensor, ...]:
    positions, ids = targets(batch)
    ends = end_positions(batch["labels"], stops)
    keep = torch.cat([positions, ends])
    inputs = model_inputs(batch, packed)
    scores = model(**inputs, logits_to_keep=keep).logits[0].float().log_softmax(-1)
    answers, at_ends = scores[: len(positions)], scores[len(positions) :]
    loss = -answers.gather(1, ids[:, None]).squeeze(1)
    row = torch.arange(len(batch["lengths"]), device=ids.device).repeat_interleave(batch["lengths"])
    last = in_last_stretch(batch["labels"], row)[positions + 1]
    ones = torch.ones_like(loss)

    def per_row(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(len(batch["lengths"]), dtype=torch.float64, device=ids.device)
        return zeros.index_add_(0, row[where], values.double())

    stop = per_row(at_ends[:, stops].exp().sum(1), ends)
    num_ends = per_row(torch.ones_like(ends, dtype=torch.float32), ends).clamp(min=1)
    return (
        per_row(loss, positions), per_row(ones, positions),
        per_row((answers.argmax(1) == ids).float(), positions),
        per_row(loss * last, positions), per_row(ones * last, positions), stop / num_ends,
    )  # fmt: skip


def end_positions(labels: torch.Tensor, stops: list[int]) -> torch.Tensor:
    """Positions after which a model should end, one for each supervised stretch.

    That is before the stretch's own end token, or at its last id when it has none.  A row's first
    id is never supervised, so stretches of neighbouring rows do not touch.
    """
    supervised = labels != IGNORE_INDEX
    followed = torch.cat([supervised[1:], supervised.new_zeros(1)])
    last = (supervised & ~followed).nonzero().squeeze(1)
    is_stop = torch.isin(labels[last], torch.tensor(stops, device=labels.device))
    return last - is_stop.long()


def in_last_stretch(labels: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Whether each position belongs to its row's last supervised stretch, ``(N,)`` bool."""
    supervised = labels != IGNORE_INDEX
    before = torch.cat([supervised.new_zeros(1), supervised[:-1]])
    stretch = (supervised & ~before).cumsum(0) * supervised
    last = torch.zeros(int(row[-1]) + 1, dtype=stretch.dtype, device=labels.device)
    last.scatter_reduce_(0, row, stretch, "amax")
    return supervised & (stretch == last[row])


def last_answer(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Cut a row into the ids before its last supervised stretch, and that stretch."""
    supervised = row["labels"] != IGNORE_INDEX
    end = int(np.flatnonzero(supervised)[-1]) + 1
    gaps = np.flatnonzero(~supervised[:end])
    start = int(gaps[-1]) + 1 if len(gaps) else 0
    return row["input_ids"][:start], row["input_ids"][start:end]


def with_other_question(rows: list[Row], max_length: int) -> list[tuple[int, Row]]:
    """Each row's last answer behind the question of another row that has another answer.

    Returns:
        The number of the row that gives the answer, and the mismatched row; rows for which no
        other question is there or fits into ``max_length`` are left out.
    """
    parts = [last_answer(row) for row in rows]
    mismatched = []
    for number, (own, answer) in enumerate(parts):
        for step in range(1, len(parts)):
            prompt, other = parts[(number + step) % len(parts)]
            differs = not np.array_equal(other, answer) and not np.array_equal(prompt, own)
            if differs and len(prompt) > 0 and len(prompt) + len(answer) <= max_length:
                labels = np.concatenate([np.full(len(prompt), IGNORE_INDEX), answer])
                ids = np.concatenate([prompt, answer])
                mismatched.append((number, {"input_ids": ids, "labels": labels}))
                break
    return mismatched
