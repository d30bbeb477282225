"""The run folder's contract, and what happens when a run meets a folder."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import train_arguments

import sft_lora
from tinyllm.errors import UserError
from tinyllm.run_folder import FINAL_FILES, OPTIONAL_FILES, RUN_FILE


@pytest.fixture
def run_copy(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


def test_a_finished_run_leaves_exactly_the_contract(finished_run):
    found = {p.name for p in finished_run.iterdir() if not p.name.startswith("checkpoint-")}
    assert found - set(OPTIONAL_FILES) == set(FINAL_FILES)
    checkpoints = sorted(p.name for p in finished_run.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-3", "checkpoint-6"]


def test_results_are_told_alike_everywhere(finished_run):
    run = json.loads((finished_run / RUN_FILE).read_text())
    card = (finished_run / "README.md").read_text()
    evaluated = json.loads((finished_run / "eval_results.json").read_text())
    assert run["status"] == "finished"
    assert run["results"]["eval_loss"] == evaluated["eval_loss"]
    assert f"{run['results']['eval_loss']:.4f}" in card
    assert run["results"]["eval_loss"] < run["results"]["eval_loss_before"]
    assert run["data"]["num_examples"] == 5 and run["data"]["num_held_out"] == 1
    log = [
        json.loads(line) for line in (finished_run / "training_log.jsonl").read_text().splitlines()
    ]
    assert log[0]["eval_loss"] == run["results"]["eval_loss_before"]


def test_files_are_readable_by_others(finished_run):
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in finished_run.iterdir() if p.is_file())


def test_the_same_run_again_does_nothing(base_folder, data_file, run_copy, capsys):
    before = {p: p.stat().st_mtime_ns for p in run_copy.rglob("*")}
    assert sft_lora.main(train_arguments(base_folder, data_file, run_copy)) == 0
    assert "nothing to do; start anew with --overwrite_output_dir" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in run_copy.rglob("*")}


@pytest.mark.parametrize(
    ("words", "difference"),
    [(["--learning_rate", "1e-3"], "learning_rate was 0.005, is now 0.001"),
     (["--lora_r", "8"], "lora_r was 4, is now 8")],
)  # fmt: skip
def test_another_run_into_the_folder_is_refused(
    base_folder, data_file, run_copy, words, difference
):
    with pytest.raises(UserError, match=difference):
        sft_lora.main(train_arguments(base_folder, data_file, run_copy, *words))
    assert json.loads((run_copy / RUN_FILE).read_text())["status"] == "finished"


def test_other_data_is_noticed(base_folder, data_file, run_copy, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(data_file.read_text().replace("等于二", "等于三"))
    with pytest.raises(UserError, match="data was"):
        sft_lora.main(train_arguments(base_folder, other, run_copy))


def test_overwrite_moves_the_old_run_aside(base_folder, data_file, run_copy):
    words = train_arguments(base_folder, data_file, run_copy, "--overwrite_output_dir", "True")
    assert sft_lora.main(words) == 0
    assert (run_copy.with_name("run.old-1") / RUN_FILE).is_file()
    assert json.loads((run_copy / RUN_FILE).read_text())["status"] == "finished"


def test_a_foreign_folder_is_refused(base_folder, data_file, tmp_path):
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(UserError, match="holds other things"):
        sft_lora.main(train_arguments(base_folder, data_file, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_written(base_folder, data_file, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written|in the way"):
        sft_lora.main(train_arguments(base_folder, data_file, tmp_path / "file" / "run"))


def test_an_interrupted_run_goes_on_to_the_same_adapter(
    base_folder, data_file, finished_run, run_copy, capsys
):
    run = json.loads((run_copy / RUN_FILE).read_text())
    (run_copy / RUN_FILE).write_text(json.dumps(run | {"status": "running"}))
    shutil.rmtree(run_copy / "checkpoint-6")
    (run_copy / "adapter_model.safetensors").unlink()
    assert sft_lora.main(train_arguments(base_folder, data_file, run_copy)) == 0
    assert "from" in capsys.readouterr().err
    name = "adapter_model.safetensors"
    assert (run_copy / name).read_bytes() == (finished_run / name).read_bytes()


def test_full_model_only_when_asked(base_folder, data_file, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from load_lora_model import load_lora_model

    words = train_arguments(base_folder, data_file, tmp_path / "run", "--save_full_model", "True")
    assert sft_lora.main(words) == 0
    state = torch.load(tmp_path / "run" / "pytorch_model.bin", weights_only=True)
    merged, _ = load_lora_model(str(base_folder), str(tmp_path / "run"), device="cpu")
    own = merged.state_dict()
    assert all(torch.allclose(state[name], own[name], atol=1e-6) for name in state)
    (tmp_path / "run" / "adapter_config.json").unlink()
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        (tmp_path / "run" / name).unlink()
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert torch.allclose(alone.lm_head.weight, own["lm_head.weight"])


def test_a_mistake_found_late_leaves_no_folder(base_folder, data_file, tmp_path):
    words = train_arguments(
        base_folder, data_file, tmp_path / "run", "--lora_target_modules", "foo"
    )
    with pytest.raises(UserError, match="it has down_proj, gate_proj"):
        sft_lora.main(words)
    assert not (tmp_path / "run").exists()
