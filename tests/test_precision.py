"""In which precision a base is trained on, and that a run notices when another machine would choose
another one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import make_model, make_tokenizer, train_arguments

import sft_lora
from tinyllm import precision
from tinyllm.command_line import parse_settings
from tinyllm.errors import UserError
from tinyllm.run_folder import RUN_FILE


@pytest.fixture(scope="module")
def half_base(tmp_path_factory):
    """A base that is stored in bfloat16."""
    folder = tmp_path_factory.mktemp("half") / "base"
    make_model().bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("stored_half", "native", "words", "expected"),
    [
        (True, True, (), torch.bfloat16),
        (True, False, (), torch.float32),
        (False, True, (), torch.float32),
        (True, True, ("--torch_dtype", "float32"), torch.float32),
        (True, True, ("--use_lora", "False"), torch.float32),
        (True, True, ("--init_lora_weights", "pissa"), torch.float32),
    ],
)
def test_what_auto_takes_on_a_cpu(
    half_base, base_folder, data_file, tmp_path, monkeypatch, stored_half, native, words, expected
):
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: native)
    base = half_base if stored_half else base_folder
    arguments = train_arguments(base, data_file, tmp_path / "run", *words)
    assert precision.weights_dtype(parse_settings(arguments)[0]) == expected


def test_a_missing_base_is_still_said_plainly(data_file, tmp_path):
    with pytest.raises(UserError, match="no such base folder"):
        sft_lora.main(train_arguments(tmp_path / "nowhere", data_file, tmp_path / "run"))


def test_weights_in_float32_under_a_bfloat16_configuration_are_not_rounded(half_base, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(half_base, folder)
    assert precision.is_stored_in_bfloat16(folder)
    config = (folder / "config.json").read_bytes()
    make_model().save_pretrained(folder)
    (folder / "config.json").write_bytes(config)
    assert not precision.is_stored_in_bfloat16(folder)


def test_a_run_recorded_as_auto_was_in_float32(
    base_folder, half_base, data_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: False)
    output = tmp_path / "run"
    words = train_arguments(half_base, data_file, output, "--max_steps", "2")
    assert sft_lora.main(words) == 0
    content = json.loads((output / RUN_FILE).read_text())
    assert content["identity"]["settings"]["torch_dtype"] == "float32"
    content["identity"]["settings"]["torch_dtype"] = "auto"  # as older versions wrote it
    (output / RUN_FILE).write_text(json.dumps(content))
    assert sft_lora.main(words) == 0  # nothing to do
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)
    with pytest.raises(UserError, match="torch_dtype was float32, is now bfloat16"):
        sft_lora.main(words)
    assert sft_lora.main([*words, "--torch_dtype", "float32"]) == 0


def test_a_run_in_bfloat16_is_not_resumed_in_float32(half_base, data_file, tmp_path, monkeypatch):
    output = tmp_path / "run"
    words = train_arguments(half_base, data_file, output, "--save_strategy", "steps",
                            "--save_steps", "2", "--max_steps", "4")  # fmt: skip
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)
    assert sft_lora.main(words) == 0
    assert json.loads((output / RUN_FILE).read_text())["settings"]["torch_dtype"] == "bfloat16"
    assert sft_lora.main(words) == 0  # nothing to do
    for file in output.glob("adapter_model.*"):
        file.unlink()
    shutil.rmtree(output / "checkpoint-4")
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: False)
    with pytest.raises(UserError, match="torch_dtype"):
        sft_lora.main(words)
