"""Advice: silent for usual numbers, one line with a reason for each unusual one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import make_model

from tinyllm.advice import Facts, Matrix, adapted_matrices, advice
from tinyllm.lora import add_lora
from tinyllm.settings import LoraSettings

USUAL = Facts(
    matrices=(Matrix("q_proj", 120, 120, 16), Matrix("up_proj", 384, 120, 16)),
    num_trainable=600_000, num_supervised=100_000, num_rows=2400, num_epochs=3, num_steps=450,
    batch_size=16, learning_rate=5e-4, num_warmup=13, scale=2.0,
)  # fmt: skip


def test_usual_numbers_need_no_advice():
    assert advice(USUAL) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_steps": 12, "num_warmup": 1}, "only 12 optimizer steps"),
        ({"num_warmup": 450}, "never reaches its peak"),
        ({"num_warmup": 200}, "44% of all steps"),
        ({"learning_rate": 1e-2}, "0.01 is high for a LoRA"),
        ({"learning_rate": 1e-5}, "1e-05 is low for a LoRA"),
        ({"matrices": (), "learning_rate": 5e-4}, "high for training every weight"),
        ({"scale": 32.0}, "multiplied by 32"),
        ({"batch_size": 128}, "128 rows in a step"),
        ({"num_supervised": 5_000}, "learn the rows by heart"),
        ({"num_supervised": 9_000_000}, "may fill up"),
        ({"num_epochs": 30.0, "num_steps": 4500}, "seen 30 times"),
        ({"matrices": (Matrix("q_proj", 120, 120, 64),)}, "from r 60 on"),
        ({"slow_seconds": 90.0}, "PRECISION=bf16"),
    ],
)
def test_each_unusual_number_gives_its_line(change, words):
    lines = advice(replace(USUAL, **change))
    assert len(lines) == 1 and words in lines[0]


@pytest.mark.parametrize(("size", "least"), [((120, 120), 60), ((384, 120), 92), ((288, 288), 144)])
def test_break_even_is_the_first_rank_that_costs_as_much(size, least):
    out, inner = size
    assert Matrix("", out, inner, 1).break_even == least
    assert least * (out + inner) >= out * inner > (least - 1) * (out + inner)


def test_matrices_of_one_size_share_a_line():
    same = tuple(Matrix(name, 120, 120, 60) for name in ("q_proj", "o_proj"))
    lines = advice(replace(USUAL, matrices=(*same, Matrix("k_proj", 60, 120, 50))))
    assert [line.split(" (")[0] for line in lines] == ["r 60 on o_proj, q_proj", "r 50 on k_proj"]


def test_matrices_are_read_off_the_model():
    settings = LoraSettings(lora_r=4, lora_alpha=8, rank_pattern='{"k_proj": 2}')
    matrices, scale = adapted_matrices(add_lora(make_model(), settings))
    assert Matrix("q_proj", 32, 32, 4) in matrices and Matrix("k_proj", 16, 32, 2) in matrices
    assert Matrix("down_proj", 32, 64, 4) in matrices and len(matrices) == 7
    assert scale == 4.0
