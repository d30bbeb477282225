"""The training benchmark's arguments, counts and tables; nothing is timed here."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import train_speed
from train_speed_child import mebibytes
from train_speed_compare import middle_of
from train_speed_jobs import CANDIDATES, FAMILIES, HYPER, SHAPES, Work, choose_rows, our_words
from train_speed_limit import flops_of_step
from train_speed_table import Measured, is_correct, quality_report, shape_report, summarise, table

from tinyllm.command_line import parse_settings
from tinyllm.errors import UserError


def measured(family: str = "TRL", rate: float = 4.0, **changes) -> Measured:
    values = {
        "settings": "fp32", "precision": "float32", "examples_per_second": rate, "slowest": rate,
        "fastest": rate, "supervised_per_second": 10 * rate, "before_mib": 500.0,
        "peak_mib": 1000.0, "share": 0.25, "first_loss": 9.0, "last_loss": 8.5, "start_up": 3.0,
    }  # fmt: skip
    return Measured(family, **(values | changes))


def result(seconds: list[float], losses: list[float], peak: float = 900.0) -> dict:
    return {
        "step_seconds": seconds, "losses": losses, "before_mib": 500.0, "peak_mib": peak,
        "start_up": 3.0,
    }  # fmt: skip


def test_default_arguments():
    arguments = train_speed.parse_arguments([])
    assert arguments.shapes == list(SHAPES)
    assert arguments.quality_tools == ["ours", "TRL"]
    assert arguments.dataset[0].is_absolute() and arguments.embedded.is_absolute()
    assert train_speed.parse_arguments(["--shapes", "none"]).shapes == []


@pytest.mark.parametrize(
    "words",
    [
        ["--shapes", "huge"], ["--steps", "0"], ["--steps", "x"], ["--repeat", "-1"],
        ["--dropout", "1"], ["--warm_up", "-1"], ["--quality_tools", "nobody"], ["--unknown"],
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(words):
    with pytest.raises(UserError) as error:
        train_speed.parse_arguments(words)
    assert "\n" not in str(error.value)


def test_rows_are_chosen_by_the_seed(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(20)), encoding="utf-8")
    chosen = choose_rows([tmp_path], 8)
    assert chosen == choose_rows([file], 8)
    assert len(set(chosen)) == 8
    with pytest.raises(UserError, match="20 rows"):
        choose_rows([tmp_path], 21)
    with pytest.raises(UserError, match=r"expected a \.jsonl"):
        choose_rows([tmp_path / "none"], 1)


def test_our_command_line_is_understood_and_equal_to_the_peers(tmp_path):
    work = Work(tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "rows.json", dropout=0.2)
    for candidate in (c for c in CANDIDATES if c.tool == "ours"):
        settings, notes = parse_settings(our_words(candidate, work, 7, 1.0, tmp_path / "out"))
        assert notes == []
        assert (settings.training.max_steps, settings.lora.lora_dropout) == (7, 0.2)
        assert (settings.lora.lora_r, settings.lora.lora_alpha) == (16, 32)
        for name, value in HYPER.items():
            assert getattr(settings.training, name) == value


def test_names_of_candidates_are_unique():
    assert len({c.name for c in CANDIDATES}) == len(CANDIDATES)
    assert {c.family for c in CANDIDATES} == set(FAMILIES)


def test_operations_are_counted_from_the_shape():
    # one layer with one 2 x 3 matrix, rank 1, a head of 2 x 10; 5 tokens, 2 of them supervised
    qkv, rest = [(2, 3), (2, 1), (2, 1)], [(3, 2)]
    before, behind = 4 * 10 + 6 * 11, 4 * 6 + 6 * 5
    needless = 2 * 10 + 2 * 6
    one_layer = 5 * (before - needless) + 2 * (behind + 4 * 20)
    assert flops_of_step(qkv + rest, 1, (2, 10), 1, 5, 2) == one_layer
    assert flops_of_step(qkv + rest, 3, (2, 10), 1, 5, 2) == one_layer + 2 * 5 * (before + behind)
    embedded = SHAPES["embedded"]
    assert sum(a * b for a, b in embedded.linears) == 384 * (384 * 2 + 192 * 2 + 1024 * 3)


def test_medians_leave_the_warm_up_out():
    trl = CANDIDATES[2]
    results = [result([9.0, 1.0, 3.0], [9.0, 8.0, 7.0]), result([9.0, 4.0, 4.0], [9.0, 8.0, 6.0])]
    row = summarise(trl, results, 1, 16, 2.0, 1e9, 8.0, 3)
    assert (row.slowest, row.fastest, row.examples_per_second) == (4.0, 8.0, 6.0)
    assert (row.supervised_per_second, row.first_loss, row.last_loss) == (12.0, 9.0, 6.0)
    assert row.share == pytest.approx(1e9 * 6.0 / 16 / 8e9)
    assert summarise(trl, results, 1, 16, 2.0, 1e9, 8.0, 9).last_loss is None


def test_a_loss_is_right_within_its_precision():
    assert is_correct(9.0001, 9.0, "float32")
    assert not is_correct(9.003, 9.0, "float32")
    assert is_correct(9.003, 9.0, "bfloat16")
    assert not is_correct(9.2, 9.0, "bfloat16")


def test_table_has_ratios_to_trl():
    rows = [measured("ours", 10.0, peak_mib=600.0), measured(), measured("recipe", last_loss=None)]
    lines = table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 5
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    head, ours, recipe = cells[0], cells[2], cells[4]
    speed = head.index("x TRL")
    memory = head.index("x TRL", speed + 1)
    assert (ours[speed], ours[memory]) == ("2.50", "0.60")
    assert recipe[head.index("loss, last step")] == "–"
    assert "–" in table([measured("ours")])


def test_reports_are_markdown_without_paths_of_this_machine():
    shape = {
        "shape": "embedded", "base": "b", "tokens_per_row": 50.2, "supervised_per_row": 20.1,
        "steps": 4, "warm_up": 1, "repeat": 2, "dropout": 0.1, "notes": ["tried this"],
        "limit_gflops": {"float32": {"own": 80.0, "large": 90.0}}, "rows": [vars(measured())],
    }  # fmt: skip
    quality = {
        "rows": 8, "epochs": 3.0, "base": "b", "last_training_losses": {"TRL: fp32": 1.0},
        "held_out_losses": {"before training": 4.0, "ours: defaults": 2.02, "TRL: fp32": 2.0},
    }  # fmt: skip
    text = shape_report(shape) + quality_report(quality)
    assert "- tried this" in text and "float32 80" in text
    assert "+1.00 %" in text and "+0.00 %" in text
    assert str(REPOSITORY) not in text


def test_memory_is_read():
    assert mebibytes() >= mebibytes("VmRSS") * 0.9 > 1


def test_the_limit_is_the_middle_of_several():
    limits = [{"float32": {"own": own, "large": own * 2}} for own in (80.0, 100.0, 20.0)]
    assert middle_of(limits) == {"float32": {"own": 80.0, "large": 160.0}}
