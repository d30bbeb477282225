"""Ragged batches: the docstring's numbers, and cutting them loses nothing."""

from __future__ import annotations

import numpy as np
import torch

from tinyllm.batches import collate, fill_up, model_inputs, split, targets

X = -100
EXAMPLES = [
    {"input_ids": np.array([5, 6, 7]), "labels": np.array([X, 6, 7])},
    {"input_ids": np.array([8, 9]), "labels": np.array([X, 9])},
]


def test_collate_is_the_docstrings_drawing():
    batch = collate(EXAMPLES)
    assert batch["input_ids"].tolist() == [5, 6, 7, 8, 9]
    assert batch["labels"].tolist() == [X, 6, 7, X, 9]
    assert batch["lengths"].tolist() == [3, 2]


def test_targets_are_the_next_ids_and_never_cross_examples():
    positions, ids = targets(collate(EXAMPLES))
    assert positions.tolist() == [0, 1, 3] and ids.tolist() == [6, 7, 9]


def test_positions_restart():
    inputs = model_inputs(collate(EXAMPLES), packed_attention=True)
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert inputs["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert inputs["max_length_q"] == 3


def test_filling_up_adds_one_example_without_targets():
    batch = collate(EXAMPLES)
    size = len(batch["input_ids"])
    filled = fill_up(batch, size + 3)
    assert len(filled["input_ids"]) == size + 3 == int(filled["lengths"].sum())
    for before, after in zip(targets(batch), targets(filled), strict=True):
        assert torch.equal(before, after)
    assert fill_up(batch, 1) is batch and fill_up(filled, size + 3) is filled


def test_split_keeps_every_example_whole_and_in_order():
    examples = [{"input_ids": np.full(n, n), "labels": np.full(n, n)} for n in (3, 2, 9, 1, 1, 4)]
    batch = collate(examples)
    parts = list(split(batch, 5))
    assert [part["lengths"].tolist() for part in parts] == [[3, 2], [9], [1, 1], [4]]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), batch["input_ids"])
    assert all(part["lengths"].sum() == len(part["labels"]) for part in parts)
