"""``--verify_resume``: says the same when it is, and different when something is forgotten."""

from __future__ import annotations

import pytest
import torch
from conftest import train_arguments

import sft_lora
from tinyllm.random_state import RandomState
from tinyllm.trainer import SftTrainer
from tinyllm.verify_resume import compare


def test_the_same_and_nothing_is_left(base_folder, data_file, tmp_path, capsys):
    words = train_arguments(base_folder, data_file, tmp_path / "run", "--verify_resume", "True")
    assert sft_lora.main(words) == 0
    assert "verify_resume: the same. 6 steps straight" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("forgotten", ["_load_rng_state", "_load_optimizer_and_scheduler"])
def test_a_trainer_that_forgets_is_found_out(
    base_folder, data_file, tmp_path, monkeypatch, capsys, forgotten
):
    monkeypatch.setattr(SftTrainer, forgotten, lambda self, checkpoint: None)
    words = train_arguments(base_folder, data_file, tmp_path / "run", "--verify_resume", "True")
    assert sft_lora.main(words) == 1
    assert "verify_resume: DIFFERENT" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_compare_names_what_differs():
    one = {"a": torch.zeros(2), "b": torch.ones(1)}
    assert compare(one, one) == []
    assert compare(one, {"a": torch.tensor([0.0, 0.5])}) == [
        "a: up to 0.5 apart", "b: only there straight",
    ]  # fmt: skip


def test_random_numbers_are_put_back():
    import random

    import numpy as np

    state = RandomState()
    drawn = [random.random(), np.random.rand(), torch.rand(1).item()]
    state.restore()
    assert drawn == [random.random(), np.random.rand(), torch.rand(1).item()]
