"""Real processes: killed, signalled, two into one folder, two ranks of which one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, hear_ctrl_c, train_arguments

from tinyllm import checkpoint

ADAPTER = "adapter_model.safetensors"
LONG = ("--num_train_epochs", "400", "--save_strategy", "steps", "--save_steps", "5",
        "--num_sample_replies", "0", "--eval_strategy", "no", "--eval_dataset", "none")  # fmt: skip
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port")

pytestmark = pytest.mark.slow


def start(base, data, output, *words, launcher=()) -> subprocess.Popen:
    command = [sys.executable, *launcher, str(REPOSITORY / "sft_lora.py"),
               *train_arguments(base, data, output, *LONG, *words)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_ctrl_c,
    )


def wait_for_checkpoint(process, folder, after: int = 0) -> None:
    """Wait until there is a checkpoint of a step beyond ``after``."""
    while not (found := checkpoint.find(folder)) or found[0].step <= after:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_sigterm_lock_and_sigkill(base_folder, data_file, tmp_path):
    folder = tmp_path / "run"
    first = start(base_folder, data_file, folder)
    wait_for_checkpoint(first, folder)
    second = start(base_folder, data_file, folder)
    assert "another run is writing into this folder" in second.communicate()[1]
    assert second.returncode == 2
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=30)[1]
    assert first.returncode == 143
    step = checkpoint.find(folder)[0].step
    assert f"at step {step}, saved {folder / f'checkpoint-{step}'}; run the same command" in said
    third = start(base_folder, data_file, folder)
    assert f"from {folder / f'checkpoint-{step}'}" in said_until(third, "going on")
    third.kill()  # SIGKILL: the lock must not outlive it
    third.communicate()
    fourth = start(base_folder, data_file, folder)
    assert "going on" in said_until(fourth, "going on")
    fourth.send_signal(signal.SIGINT)
    fourth.communicate(timeout=30)
    assert fourth.returncode == 130


def said_until(process, word: str) -> str:
    for line in process.stderr:
        if word in line or line.startswith("error"):
            return line
    return ""


def test_one_of_two_ranks_dies(base_folder, data_file, tmp_path):
    folder = tmp_path / "run"
    launcher = (*TORCHRUN, free_port())
    agent = start(base_folder, data_file, folder, launcher=launcher)
    wait_for_checkpoint(agent, folder)
    ranks = subprocess.run(
        ["ps", "--ppid", str(agent.pid), "-o", "pid="], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    said = agent.communicate(timeout=60)[1]
    assert agent.returncode != 0
    assert "another process of this run has ended" in said or "stopped by SIGTERM" in said
    assert all(checkpoint.problem(one.path) is None for one in checkpoint.find(folder))
    last = checkpoint.find(folder)[0].step
    again = start(base_folder, data_file, folder, launcher=launcher)
    assert "from" in said_until(again, "going on")
    wait_for_checkpoint(again, folder, last)
    again.terminate()
    said = again.communicate(timeout=60)[1]
    assert "stopped by SIGTERM at step" in said
    alone = start(base_folder, data_file, folder)
    assert "processes was 2, is now 1" in alone.communicate()[1]
