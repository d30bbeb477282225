"""Settings: default < YAML < command line, old names, unknown names, types."""

from __future__ import annotations

import re

import pytest
from conftest import REPOSITORY

from tinyllm.command_line import parse_settings
from tinyllm.errors import UserError


def parse(*words: str):
    return parse_settings([*words, "--use_cpu", "True"])


def test_defaults_are_the_guides():
    settings, notes = parse()
    assert (settings.lora.lora_r, settings.lora.lora_alpha) == (16, 32)
    assert settings.lora.lora_dropout == 0.1
    assert len(settings.lora.lora_target_modules) == 7
    assert settings.training.learning_rate == 5e-4
    assert not notes


def test_the_launchers_variables_are_the_programs_defaults():
    text = (REPOSITORY / "script/sft_lora.sh").read_text(encoding="utf-8")
    shell = dict(re.findall(r"^(\w+)=\$\{\1:-([^}\s]+)\}", text, re.MULTILINE))
    settings, _ = parse()
    assert int(shell["MBS"]) == settings.training.per_device_train_batch_size
    assert int(shell["GAS"]) == settings.training.gradient_accumulation_steps
    assert float(shell["LR"]) == settings.training.learning_rate
    assert float(shell["TRAIN_EPOCHS"]) == settings.training.num_train_epochs
    assert int(shell["LORA_R"]) == settings.lora.lora_r
    assert int(shell["LORA_ALPHA"]) == settings.lora.lora_alpha
    assert float(shell["LORA_DROPOUT"]) == settings.lora.lora_dropout
    assert shell["LORA_TARGETS"].split(",") == settings.lora.lora_target_modules
    assert [shell["DATASET"]] == settings.data.dataset


@pytest.mark.parametrize(
    ("words", "read"),
    [
        (["--model_name_or_path", "x"], lambda s: s.base.base_model_path == "x"),
        (["--base_model_path=x"], lambda s: s.base.base_model_path == "x"),
        (["--dataset_dir_or_path", "a,b"], lambda s: s.data.dataset == ["a", "b"]),
        (["--lora-rank", "4"], lambda s: s.lora.lora_r == 4),
        (["--lora_target_modules", "q_proj", "v_proj"],
         lambda s: s.lora.lora_target_modules == ["q_proj", "v_proj"]),
        (["--use_lora", "False"], lambda s: s.lora.use_lora is False),
        (["--warmup_ratio", "0.1"], lambda s: s.training.warmup_steps == 0.1),
        (["--evaluation_strategy", "no"], lambda s: s.training.eval_strategy == "no"),
        (["--overwrite_output_dir"], lambda s: s.run.overwrite_output_dir is True),
        (["--max_steps", "-1"], lambda s: s.training.max_steps == -1),
    ],
)  # fmt: skip
def test_names_people_type(words, read):
    assert read(parse(*words)[0])


def test_old_names_are_translated_and_said():
    assert parse("--warmup_ratio", "0.1")[1] == ["--warmup_ratio is now called --warmup_steps"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora_rnk", "4"], "did you mean --lora_rank"),
        (["--learning_rat=1"], "did you mean --learning_rate"),
        (["--lora_r", "x"], "invalid int value"),
        (["--lora_r", "0"], "rank must be 1 or more"),
        (["--lora_dropout", "1.5"], r"must be in \[0, 1\)"),
        (["--overlong", "cut"], "expected error, drop or shorten"),
        (["--eval_strategy", "sometimes"], "sometimes"),
        (["--save_safetensors", "True"], "writes both"),
        (["--config"], "needs a value"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_clear_line(words, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_settings(words)
    assert "\n" not in str(caught.value)


def test_yaml_numbers_stay_numbers_and_the_command_line_wins(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(
        "learning_rate: 2e-4\nlora:\n  lora_r: 8\n  lora_target_modules: [q_proj, v_proj]\n"
        "use_lora: true\nnum_train_epochs: 1\n"
    )
    settings, _ = parse("--config", str(path), "--lora_r", "2")
    assert settings.training.learning_rate == 2e-4
    assert settings.lora.lora_r == 2
    assert settings.lora.lora_target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lora_rr: 3", "did you mean --lora_r"),
        ("seed: 1\nseed: 2", "line 2: 'seed' is set twice"),
        ("- a\n- b", "expected 'name: value' lines"),
        ("a: [", "my.yaml"),
    ],
)
def test_bad_yaml_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "my.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        parse_settings(["--config", str(path)])


def test_missing_yaml():
    with pytest.raises(UserError, match="no such file"):
        parse_settings(["--config", "nowhere.yaml"])
