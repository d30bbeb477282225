"""Examples → batches without padding.

A batch is *ragged*: its examples lie behind each other in flat tensors.  Two examples of 3 and 2
ids, the last two and one of them supervised:

    input_ids  [5 6 7 8 9]          (N,)  N = 5 ids of all examples
    labels     [-100 6 7 -100 9]    (N,)
    lengths    [3 2]                (num_examples,)

One optimizer step of the Trainer is one such batch (MBS × GAS examples per rank); ``split`` cuts it
into the micro-batches that fit into memory, and ``model_inputs`` makes a row of a micro-batch that
any causal model of transformers takes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from tinyllm.attention import no_mask
from tinyllm.chat_format import IGNORE_INDEX

Batch = dict[str, torch.Tensor]


def collate(examples: list[dict[str, np.ndarray]]) -> Batch:
    """Join examples into a ragged batch; see the module's drawing."""
    return {
        "input_ids": _flat(examples, "input_ids"),
        "labels": _flat(examples, "labels"),
        "lengths": torch.tensor([len(e["input_ids"]) for e in examples], dtype=torch.long),
    }


def _flat(examples: list[dict[str, np.ndarray]], name: str) -> torch.Tensor:
    none = [np.empty(0, np.int64)]  # a rank may get no rows
    return torch.from_numpy(
        np.concatenate([example[name] for example in examples] or none).astype(np.int64)
    )


def nothing_to_learn(like: Batch) -> Batch:
    """A batch of one example of two ids, none of them supervised: its loss and gradients are 0."""
    device = like["input_ids"].device
    return {
        "input_ids": torch.zeros(2, dtype=torch.long, device=device),
        "labels": torch.full((2,), IGNORE_INDEX, device=device),
        "lengths": torch.tensor([2], device=device),
    }


def fill_up(batch: Batch, multiple: int) -> Batch:
    """The batch and, where N is no multiple, one more example, of which nothing is learned."""
    missing = -len(batch["input_ids"]) % multiple
    if not missing:
        return batch
    ids, labels, lengths = (batch[name] for name in ("input_ids", "labels", "lengths"))
    return {
        "input_ids": torch.cat([ids, ids.new_zeros(missing)]),
        "labels": torch.cat([labels, labels.new_full((missing,), IGNORE_INDEX)]),
        "lengths": torch.cat([lengths, lengths.new_tensor([missing])]),
    }


def split(batch: Batch, max_tokens: int) -> Iterator[Batch]:
    """Cut a batch into micro-batches of whole examples with at most ``max_tokens`` ids each.

    An example longer than that gets a micro-batch of its own.  The order is kept, so the sum of
    the gradients is the same however the batch is cut.
    """
    lengths, start, first = batch["lengths"].tolist(), 0, 0
    while first < len(lengths):
        last, size = first, 0
        while last < len(lengths) and (last == first or size + lengths[last] <= max_tokens):
            size += lengths[last]
            last += 1
        yield {
            "input_ids": batch["input_ids"][start : start + size],
            "labels": batch["labels"][start : start + size],
            "lengths": batch["lengths"][first:last],
        }
        start, first = start + size, last


def targets(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions whose next id is learned, and those next ids, each ``(num_supervised,)``.

    An example's first id is never supervised, so shifting the flat labels leaks nothing.
    """
    following = batch["labels"][1:]
    positions = (following != IGNORE_INDEX).nonzero().squeeze(-1)
    return positions, following[positions]


def model_inputs(batch: Batch, packed_attention: bool) -> dict[str, torch.Tensor | int]:
    """Keyword arguments for a causal model: one row ``(1, N)`` with restarting positions.

    Args:
        packed_attention: the model attends by ``cu_seq_lens_q``; otherwise transformers derives
            the block-diagonal mask from the positions.
    """
    lengths = batch["lengths"]
    ends = lengths.cumsum(0)
    starts = ends - lengths
    positions = torch.arange(len(batch["input_ids"]), device=lengths.device)
    inputs = {
        "input_ids": batch["input_ids"][None],
        "position_ids": (positions - starts.repeat_interleave(lengths))[None],
        "use_cache": False,
    }
    if packed_attention:
        cu_seq_lens = torch.cat([starts, ends[-1:]]).to(torch.int32)
        longest = int(lengths.max())
        inputs |= {
            "attention_mask": no_mask(lengths.device),
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    return inputs
