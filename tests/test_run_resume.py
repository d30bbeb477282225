"""The same command goes on by itself, to the very bytes of the run that was never interrupted."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal

import pytest
from conftest import train_arguments
from transformers import TrainerCallback

import sft_lora
from tinyllm import checkpoint
from tinyllm.errors import Interrupted, UserError, run_program
from tinyllm.lock import FolderLock
from tinyllm.run_folder import RUN_FILE
from tinyllm.saving import SavingTrainer

ADAPTER = "adapter_model.safetensors"
EVERY_STEP = ("--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "20",
              "--logging_steps", "2", "--num_sample_replies", "0")  # fmt: skip


def run(base, data, output, *words) -> int:
    return sft_lora.main(train_arguments(base, data, output, *words))


def steps_of(folder) -> list[int]:
    return [one.step for one in checkpoint.find(folder)]


def results_of(folder) -> dict:
    results = json.loads((folder / RUN_FILE).read_text())["results"]
    return {k: results[k] for k in ("num_steps", "train_loss", "eval_loss", "eval_loss_before")}


def log_of(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    timed = re.compile("runtime|per_second")
    return [{k: v for k, v in line.items() if not timed.search(k)} for line in lines]


def assert_same_run(one, other):
    assert (one / ADAPTER).read_bytes() == (other / ADAPTER).read_bytes()
    assert results_of(one) == results_of(other)
    assert log_of(one) == log_of(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base_folder, data_file):
    """A run that was never interrupted, with a checkpoint after each of its six steps."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert run(base_folder, data_file, output, *EVERY_STEP) == 0
    assert steps_of(output) == [6, 5, 4, 3, 2, 1]
    return output


@pytest.fixture
def cut(whole, tmp_path):
    """Gives a copy of the run as a kill after a step would leave it."""

    def cut_after(step: int):
        folder = shutil.copytree(whole, tmp_path / "run")
        stored = json.loads((folder / RUN_FILE).read_text())
        (folder / RUN_FILE).write_text(json.dumps(stored | {"status": "running"}))
        for one in checkpoint.find(folder):
            if one.step > step:
                shutil.rmtree(one.path)
        for name in (ADAPTER, "adapter_model.bin", "adapter_config.json"):
            (folder / name).unlink()
        with (folder / "training_log.jsonl").open("a") as log:
            log.write('{"loss": 1.2, "ste')
        return folder

    return cut_after


@pytest.mark.parametrize("step", [0, 2, 3, 5, 6])
def test_going_on_after_any_step_gives_the_same_run(base_folder, data_file, whole, cut, step):
    folder = cut(step)
    assert run(base_folder, data_file, folder, *EVERY_STEP) == 0
    assert_same_run(folder, whole)
    assert steps_of(folder) == [6, 5, 4, 3, 2, 1]


def test_how_often_it_evaluates_or_saves_changes_nothing(base_folder, data_file, whole, tmp_path):
    words = ("--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "no")
    assert run(base_folder, data_file, tmp_path / "run", *words) == 0
    assert (tmp_path / "run" / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


def test_a_damaged_checkpoint_is_skipped_and_named(base_folder, data_file, whole, cut, capsys):
    folder = cut(5)
    path = folder / "checkpoint-5" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (folder / "checkpoint-4" / "rng_state.pth").unlink()
    assert run(base_folder, data_file, folder, *EVERY_STEP) == 0
    said = capsys.readouterr().err
    assert "checkpoint-5: optimizer.pt is damaged" in said
    assert "checkpoint-4: rng_state.pth is missing" in said
    assert f"from {folder / 'checkpoint-3'}" in said
    assert_same_run(folder, whole)
    assert all(checkpoint.problem(one.path) is None for one in checkpoint.find(folder))


def test_the_user_chooses_the_checkpoint(base_folder, data_file, whole, cut, capsys):
    folder = cut(5)
    words = ("--resume_from_checkpoint", str(folder / "checkpoint-2"))
    assert run(base_folder, data_file, folder, *EVERY_STEP, *words) == 0
    assert f"from {folder / 'checkpoint-2'}" in capsys.readouterr().err
    assert_same_run(folder, whole)


def test_a_new_folder_goes_on_from_a_checkpoint_elsewhere(base_folder, data_file, whole, tmp_path):
    words = ("--resume_from_checkpoint", str(whole / "checkpoint-4"))
    assert run(base_folder, data_file, tmp_path / "new", *EVERY_STEP, *words) == 0
    assert (tmp_path / "new" / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert steps_of(tmp_path / "new") == [6, 5]


def test_a_chosen_checkpoint_that_cannot_be_used_is_an_error(
    base_folder, data_file, whole, tmp_path
):
    new = tmp_path / "new"
    for path, said in [
        ("nowhere", "no such folder"),
        (whole / "checkpoint-4", "lora_alpha was 32"),
    ]:
        words = ("--resume_from_checkpoint", str(path), "--lora_alpha", "8")
        with pytest.raises(UserError, match=said):
            run(base_folder, data_file, new, *EVERY_STEP, *words)
        assert not new.exists()
    with pytest.raises(UserError, match="holds no checkpoint"):
        run(base_folder, data_file, new, "--resume_from_checkpoint", "True")


def test_false_starts_anew_and_keeps_the_old(base_folder, data_file, whole, cut):
    folder = cut(3)
    words = ("--resume_from_checkpoint", "False")
    assert run(base_folder, data_file, folder, *EVERY_STEP, *words) == 0
    assert_same_run(folder, whole)
    assert steps_of(folder.with_name("run.old-1")) == [3, 2, 1]


@pytest.mark.parametrize(
    ("words", "difference"),
    [(("--seed", "1"), "seed was 42, is now 1"), (("--max_grad_norm", "3"), "max_grad_norm was"),
     (("--system_prompt", "x"), "data was")],
)  # fmt: skip
def test_another_run_is_refused(base_folder, data_file, cut, words, difference):
    folder = cut(3)
    with pytest.raises(UserError, match=difference):
        run(base_folder, data_file, folder, *EVERY_STEP, *words)
    assert steps_of(folder) == [3, 2, 1]


def test_another_world_size_is_refused(base_folder, data_file, cut):
    folder = cut(3)
    stored = json.loads((folder / RUN_FILE).read_text())
    stored["identity"]["processes"] = 2
    (folder / RUN_FILE).write_text(json.dumps(stored))
    with pytest.raises(UserError, match="processes was 2, is now 1"):
        run(base_folder, data_file, folder, *EVERY_STEP)


def test_a_second_run_into_the_folder_is_refused(base_folder, data_file, cut):
    folder = cut(3)
    other = FolderLock(folder)
    other.take()
    with pytest.raises(UserError, match=rf"another run is writing .*\(process {os.getpid()} on"):
        run(base_folder, data_file, folder, *EVERY_STEP)
    with pytest.raises(UserError, match="another run is writing"):
        run(base_folder, data_file, folder, "--overwrite_output_dir", "True")
    assert steps_of(folder) == [3, 2, 1]
    other.release()
    assert run(base_folder, data_file, folder, *EVERY_STEP) == 0


def test_a_run_that_had_stopped_early_stays_stopped(base_folder, data_file, tmp_path):
    words = (*EVERY_STEP, "--eval_strategy", "steps", "--eval_steps", "1",
             "--early_stopping_patience", "1", "--early_stopping_threshold", "1000")  # fmt: skip
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert run(base_folder, data_file, whole, *words) == 0
    assert steps_of(whole) == [2, 1]
    shutil.copytree(whole, folder)
    stored = json.loads((folder / RUN_FILE).read_text())
    (folder / RUN_FILE).write_text(json.dumps(stored | {"status": "running"}))
    (folder / ADAPTER).unlink()
    with pytest.raises(UserError, match="eval_steps was 1"):
        run(base_folder, data_file, folder, *words, "--eval_steps", "2")
    assert run(base_folder, data_file, folder, *words) == 0
    assert steps_of(folder) == [2, 1]
    assert_same_run(folder, whole)


@pytest.fixture
def signalled(monkeypatch):
    """Gives a way to send this process a signal in the middle of a training."""

    def at(number: int, event: str, step: int) -> None:
        def send(self, args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), number)

        init = SavingTrainer.__init__
        callback = type("Sender", (TrainerCallback,), {event: send})

        def with_sender(self, *args, **kwargs):
            init(self, *args, **kwargs)
            self.add_callback(callback())

        monkeypatch.setattr(SavingTrainer, "__init__", with_sender)

    return at


@pytest.mark.parametrize(
    ("number", "code", "step"),
    [(signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 3), (signal.SIGTERM, 143, 6)],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    base_folder, data_file, whole, tmp_path, signalled, monkeypatch, capsys, number, code, step
):
    words = ("--save_strategy", "no", "--logging_steps", "2", "--num_sample_replies", "0")
    with monkeypatch.context():
        signalled(number, "on_step_begin", step - 1)
        folder = tmp_path / "run"
        assert run_program(lambda: run(base_folder, data_file, folder, *words)) == code
    said = capsys.readouterr().err
    assert "run the same command again to go on" in said
    assert "Traceback" not in said
    if step > 1:  # it stops before the step begins
        assert steps_of(folder) == [step - 1]
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert run(base_folder, data_file, folder, *words) == 0
    assert_same_run(folder, whole)


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_a_signal_at_the_end_of_an_epoch_makes_up_the_evaluation(
    base_folder, data_file, tmp_path, signalled, monkeypatch, strategy
):
    every = ("--save_steps", "3", "--eval_steps", "3") if strategy == "steps" else ()
    words = ("--save_strategy", strategy, "--eval_strategy", strategy, *every,
             "--load_best_model_at_end", "True", "--logging_steps", "2",
             "--num_sample_replies", "0")  # fmt: skip
    assert run(base_folder, data_file, tmp_path / "whole", *words) == 0
    folder = tmp_path / "run"
    signalled(signal.SIGTERM, "on_optimizer_step", 2)  # within the third step
    with pytest.raises(Interrupted):
        run(base_folder, data_file, folder, *words)
    monkeypatch.undo()
    assert steps_of(folder) == [3]
    assert run(base_folder, data_file, folder, *words) == 0
    assert_same_run(folder, tmp_path / "whole")


def test_two_signals_do_not_wait(base_folder, data_file, tmp_path, monkeypatch):
    from tinyllm import interrupt

    monkeypatch.setattr(interrupt, "SAME_SIGNAL_SECONDS", -1)

    def impatient(self, model, inputs, num_items_in_batch=None):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr("tinyllm.trainer.SftTrainer.training_step", impatient)
    with pytest.raises(Interrupted, match="at once"):
        run(base_folder, data_file, tmp_path / "run")
