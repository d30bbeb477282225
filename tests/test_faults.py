"""Each fault ends in one clear line, and leaves the last good checkpoint as it was."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROWS, train_arguments, write_jsonl

import sft_lora
from tinyllm import checkpoint, interrupt
from tinyllm.errors import UserError, run_program
from tinyllm.interrupt import StopRequest
from tinyllm.trainer import SftTrainer

EVERY_STEP = ("--save_strategy", "steps", "--save_steps", "1", "--num_sample_replies", "0")
ADAPTER = "adapter_model.safetensors"


def run(base, data, output, *words) -> int:
    return sft_lora.main(train_arguments(base, data, output, *EVERY_STEP, *words))


def good_steps(folder) -> list[int]:
    found = checkpoint.find(folder)
    assert all(checkpoint.problem(one.path) is None for one in found)
    return [one.step for one in found]


def goes_on(base, data, folder, finished_run) -> None:
    """The same command, with nothing wrong any more, ends with the adapter that it should."""
    assert not [path for path in folder.glob(".*") if "writing" in path.name]
    assert run(base, data, folder) == 0
    assert (folder / ADAPTER).read_bytes() == (finished_run / ADAPTER).read_bytes()


@pytest.mark.parametrize("library", ["torch", "safetensors", "fsync"])
def test_a_full_disk(base_folder, data_file, tmp_path, monkeypatch, library, finished_run):
    folder, fsync, limit = tmp_path / "run", os.fsync, resource.getrlimit(resource.RLIMIT_FSIZE)
    fill, size = SftTrainer._fill, {"torch": 20_000, "safetensors": 9_000, "fsync": None}[library]

    def on_a_full_disk(self, scratch):
        if self.state.global_step != 3:
            return fill(self, scratch)
        if size is None:
            monkeypatch.setattr(os, "fsync", full)
            return fill(self, scratch)
        # a file that may not grow further: the same path through the libraries as a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            return fill(self, scratch)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SftTrainer, "_fill", on_a_full_disk)
        with pytest.raises(UserError) as caught:
            run(base_folder, data_file, folder)
    monkeypatch.setattr(os, "fsync", fsync)
    said = str(caught.value)
    assert said.startswith(f"step 3: the checkpoint cannot be written to {folder}: ")
    assert "checkpoint-2 is intact" in said and "\n" not in said
    assert good_steps(folder) == [2, 1]
    goes_on(base_folder, data_file, folder, finished_run)


@pytest.fixture
def as_nobody(tmp_path):
    """Root may write anywhere: the test that must not is another user for a moment."""
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    if os.getuid() == 0:
        os.seteuid(65534)
    yield
    if os.getuid() == 0:
        os.seteuid(0)


def test_a_read_only_folder(base_folder, data_file, tmp_path, as_nobody):
    from tinyllm import run_folder
    from tinyllm.run import _take_lock

    for attempt in (run_folder.create, _take_lock):
        with pytest.raises(UserError, match=r"cannot be written: (Permission|Read-only)"):
            attempt(tmp_path / "run" if os.getuid() == 0 else Path("/proc/run"))


def test_a_folder_that_becomes_read_only(base_folder, data_file, tmp_path, monkeypatch):
    rename = Path.rename

    def read_only(self, target):
        if ".checkpoint-2" in self.name:
            raise OSError(30, "Read-only file system")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", read_only)
    with pytest.raises(UserError, match=r"step 2: .*Read-only file system; checkpoint-1 is intact"):
        run(base_folder, data_file, tmp_path / "run")
    assert good_steps(tmp_path / "run") == [1]


def test_a_log_that_cannot_be_written(base_folder, data_file, tmp_path, monkeypatch):
    from tinyllm.progress import LogFile

    def full(self, args, state, control, **kwargs):
        if state.global_step:
            raise OSError(28, "No space left on device", str(self.path))

    monkeypatch.setattr(LogFile, "on_log", full)
    with pytest.raises(UserError, match=r"training_log.jsonl: cannot be written: No space left"):
        run(base_folder, data_file, tmp_path / "run", "--logging_steps", "2")


def broken_loss(value: float, step: int):
    """``sum_of_losses`` that gives ``value`` in one step."""
    real = SftTrainer.sum_of_losses

    def loss(self, model, batch):
        result = real(self, model, batch)
        return result * value if self.state.global_step == step - 1 and model.training else result

    return loss


@pytest.mark.parametrize("value", ["nan"])
def test_a_loss_that_is_no_number_names_step_and_rows(
    base_folder, tmp_path, monkeypatch, value, finished_run, data_file
):
    folder, seen = tmp_path / "run", []
    step = SftTrainer.training_step

    def spy(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step == 4:
            seen.extend(self.find_rows([p.numpy().astype("int32").tobytes() for p in
                                        inputs["input_ids"].split(inputs["lengths"].tolist())]))  # fmt: skip
        return step(self, model, inputs, num_items_in_batch)

    with monkeypatch.context() as patch:
        patch.setattr(SftTrainer, "sum_of_losses", broken_loss(float(value), 5))
        patch.setattr(SftTrainer, "training_step", spy)
        with pytest.raises(UserError) as caught:
            run(base_folder, data_file, folder)
    said = str(caught.value)
    assert said.startswith(f"step 5: the loss is {value}, from the rows {data_file}:")
    assert len(seen) == 2 and ", ".join(seen) in said
    assert "checkpoint-4 is intact" in said and "\n" not in said
    goes_on(base_folder, data_file, folder, finished_run)


def test_a_gradient_that_is_no_number_is_stopped_before_it_is_taken(
    base_folder, data_file, tmp_path, monkeypatch, finished_run
):
    real = SftTrainer.training_step

    def broken(self, model, inputs, num_items_in_batch=None):
        loss = real(self, model, inputs, num_items_in_batch)
        if self.state.global_step == 2:
            next(p for p in model.parameters() if p.requires_grad).grad[0, 0] = float("nan")
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(SftTrainer, "training_step", broken)
        with pytest.raises(UserError, match=r"step 3: the gradient is nan, from the rows .*:\d"):
            run(base_folder, data_file, tmp_path / "run")
    goes_on(base_folder, data_file, tmp_path / "run", finished_run)


def test_rows_are_found_by_what_they_say(base_folder, tmp_path):
    from transformers import AutoTokenizer

    from tinyllm.batches import collate
    from tinyllm.chat_format import chat_format_of
    from tinyllm.command_line import parse_settings
    from tinyllm.data import load_data
    from tinyllm.row_search import find_rows, ids_of, rows_text

    first = write_jsonl(tmp_path / "d" / "a.jsonl", [{"bad": 1}, *ROWS[:3]])
    write_jsonl(tmp_path / "d" / "b.jsonl", [ROWS[1], *ROWS[3:]])
    settings, _ = parse_settings(["--dataset", str(tmp_path / "d"), "--bad_rows", "skip",
                                  "--use_cpu", "True", "--eval_dataset", "none"])  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    train = load_data(settings.data, chat_format_of(tokenizer), 256, 0).train
    wanted = ids_of(collate([train[i] for i in range(len(train))]))
    places = find_rows(settings.data, tokenizer, 256, [*wanted, b"none"])
    a, b = first, first.with_name("b.jsonl")
    assert places == [f"{a}:2", f"{a}:3", f"{a}:4", f"{a}:3", f"{b}:2", f"{b}:3", f"{b}:4", "?"]
    assert rows_text([str(i) for i in range(23)]).endswith("19 and 3 more")


def test_gradients_that_are_all_zero(base_folder, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(SftTrainer, "sum_of_losses", broken_loss(0.0, 1))
    with pytest.raises(UserError, match="step 1: every gradient is zero, so nothing would be"):
        run(base_folder, data_file, tmp_path / "run")
    assert good_steps(tmp_path / "run") == []


@pytest.mark.parametrize("reentrant", ["true", None])
def test_gradient_checkpointing_trains_the_same(
    base_folder, data_file, tmp_path, finished_run, reentrant
):
    words = ["--gradient_checkpointing", "True"]
    if reentrant:
        words += ["--gradient_checkpointing_kwargs", f'{{"use_reentrant": {reentrant}}}']
    assert run(base_folder, data_file, tmp_path / "run", *words) == 0
    assert (tmp_path / "run" / ADAPTER).read_bytes() == (finished_run / ADAPTER).read_bytes()


def out_of_memory_for_real(*args, **kwargs):
    return torch.empty(2**48)


def out_of_gpu_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("fault", [out_of_memory_for_real, out_of_gpu_memory])
@pytest.mark.parametrize("where", ["training_step", "evaluation_loop"])
def test_out_of_memory_says_what_to_lower(
    base_folder, data_file, tmp_path, monkeypatch, fault, where
):
    monkeypatch.setattr(SftTrainer, where, fault)
    with pytest.raises(UserError) as caught:
        run(base_folder, data_file, tmp_path / "run")
    said = str(caught.value)
    assert said.startswith("out of memory: lower MBS (--per_device_train_batch_size, now 2)")
    assert "--max_length" in said and "\n" not in said


def test_our_own_mistakes_keep_their_traceback(base_folder, data_file, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(SftTrainer, "training_step", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(base_folder, data_file, tmp_path / "run")


def test_a_checkpoint_with_code_in_it_is_skipped(
    base_folder, data_file, finished_run, tmp_path, capsys
):
    import shutil

    folder = shutil.copytree(finished_run, tmp_path / "run")
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(content | {"status": "running"}))

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    about = checkpoint.read_manifest(folder / "checkpoint-6")
    torch.save({"state": Trap()}, folder / "checkpoint-6" / "optimizer.pt")
    (folder / "checkpoint-6").rename(folder / "x")
    (folder / "x" / "manifest.json").unlink()
    about.pop("files")
    checkpoint.seal(folder / "x", folder / "checkpoint-6", about)
    words = train_arguments(base_folder, data_file, folder)
    assert sft_lora.main(words) == 0
    assert "checkpoint-6: optimizer.pt holds more than tensors" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()
    assert (folder / ADAPTER).read_bytes() == (finished_run / ADAPTER).read_bytes()


def test_a_main_thread_that_is_stuck_is_ended_all_the_same(monkeypatch, capsys):
    ended = threading.Event()
    codes = []

    def end(code):
        codes.append(code)
        ended.set()
        raise SystemExit

    monkeypatch.setattr(interrupt, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with StopRequest() as stop, stop.defer():
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended.wait(20)
    assert codes == [143]
    assert "not saved; run the same command again" in capsys.readouterr().err


def test_a_signal_outside_of_the_training_ends_at_once(capsys):
    def program():
        with StopRequest():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)

    assert run_program(program) == 143
    assert capsys.readouterr().err.strip().endswith("run the same command again to go on")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_launcher_passes_a_signal_on_as_an_exit_code(monkeypatch, number, code):
    from accelerate.commands import launch as accelerate_launch
    from torch.distributed.elastic.multiprocessing import SignalException

    from tinyllm import launch

    def stopped(args):
        raise SignalException("stopped", signal.Signals(number))

    monkeypatch.setattr(accelerate_launch, "launch_command", stopped)
    assert launch.main(["sft_lora.py"]) == code
    assert launch.explain(1, code) == code
