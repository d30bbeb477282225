"""No orphans: when a launcher is killed, the processes that it has started end within seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import REPOSITORY, train_arguments

from tinyllm import checkpoint
from tinyllm.interrupt import StopRequest
from tinyllm.launcher_watch import LAUNCHER_VARIABLE, parent_to_watch, stop_is_under_way

SECONDS = 15
# A launcher that starts a process as torchrun and accelerate do, prints its id, and waits.
LAUNCHER = """
import os, subprocess, sys, time
from tinyllm.launcher_watch import name_launcher
if sys.argv[1] == "ours": name_launcher()
environment = os.environ | ({"TORCHELASTIC_RUN_ID": "x"} if sys.argv[1] == "torchrun" else {})
process = subprocess.Popen([sys.executable, "-c", sys.argv[2]], env=environment, start_new_session=True)
print(process.pid, flush=True)
time.sleep(600)
"""
RANK = """
import time
from tinyllm.launcher_watch import watch_launcher
watch_launcher()
time.sleep(600)
"""
DEAF = (
    """
import signal
from tinyllm import launcher_watch
signal.signal(signal.SIGTERM, signal.SIG_IGN)
launcher_watch.PATIENCE_SECONDS = 1
"""
    + RANK
)  # no word of SIGTERM reaches it


@pytest.fixture
def started():
    """Processes to end in any case."""
    found: list[psutil.Process] = []
    yield found
    for process in found:
        if process.is_running():
            process.kill()


def ended(process: psutil.Process) -> bool:
    """Whether it ends in time; one that nobody has waited for counts as ended."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def launch(kind: str, code: str, started: list) -> tuple[subprocess.Popen, psutil.Process]:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, kind, code], cwd=REPOSITORY, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    rank = psutil.Process(int(launcher.stdout.readline()))
    started += [rank, psutil.Process(launcher.pid)]
    return launcher, rank


@pytest.mark.parametrize(("kind", "code"), [("ours", RANK), ("torchrun", RANK), ("ours", DEAF)],
                         ids=["ours", "torchrun", "deaf"])  # fmt: skip
def test_a_process_ends_with_its_launcher(kind, code, started):
    launcher, rank = launch(kind, code, started)
    time.sleep(1.5)
    assert rank.is_running() and launcher.poll() is None
    launcher.kill()
    launcher.wait()
    assert ended(rank)


def test_a_launcher_that_went_before_is_noticed(started):
    launcher, rank = launch("ours", "import time; time.sleep(1)\n" + RANK, started)
    launcher.kill()
    launcher.wait()
    environment = {"TORCHELASTIC_RUN_ID": "x", LAUNCHER_VARIABLE: str(launcher.pid)}
    assert parent_to_watch(environment) == launcher.pid != os.getppid()
    rank.kill()


def test_what_a_shell_has_started_outlives_it(started):
    launcher, process = launch("nohup", RANK, started)
    time.sleep(1)
    launcher.kill()
    launcher.wait()
    time.sleep(3)
    assert process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_who_is_watched():
    parent = os.getppid()
    assert parent_to_watch({}) is None
    assert (
        parent_to_watch({LAUNCHER_VARIABLE: str(os.getpid())}) is None
    )  # started by one of its own
    assert parent_to_watch({LAUNCHER_VARIABLE: str(parent)}) == parent
    assert parent_to_watch({"TORCHELASTIC_RUN_ID": "x"}) == parent
    both = {"TORCHELASTIC_RUN_ID": "x", LAUNCHER_VARIABLE: str(os.getpid())}
    assert parent_to_watch(both) == parent  # a shell stands between the two


LAUNCH = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("module", ["tinyllm.launch", "accelerate.commands.launch"])
def test_the_ranks_of_a_killed_launch_end_and_leave_a_checkpoint(
    module, base_folder, data_file, tmp_path, started
):
    folder = tmp_path / "run"
    words = train_arguments(base_folder, data_file, folder, "--num_train_epochs", "400",
                            "--save_strategy", "steps", "--save_steps", "5", "--eval_strategy", "no",
                            "--num_sample_replies", "0", "--eval_dataset", "none")  # fmt: skip
    said = tmp_path / "said"
    with said.open("w") as out:
        launcher = subprocess.Popen(
            [sys.executable, "-m", module, *LAUNCH, "sft_lora.py", *words], cwd=REPOSITORY,
            stderr=out, stdout=out, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    started.append(psutil.Process(launcher.pid))
    while not checkpoint.find(folder):
        assert launcher.poll() is None, said.read_text()
        time.sleep(0.1)
    ranks = psutil.Process(launcher.pid).children()
    started += ranks
    assert len(ranks) == 2
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    assert all(ended(rank) for rank in ranks), said.read_text()
    assert said.read_text().count("the launcher of this process has ended") == 1
    assert all(checkpoint.problem(one.path) is None for one in checkpoint.find(folder))
    assert f"at step {checkpoint.find(folder)[0].step}, saved" in said.read_text()


def test_a_save_under_way_is_not_signalled_again():
    assert not stop_is_under_way()
    with StopRequest() as request, request.defer():
        assert not stop_is_under_way()
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.wanted and stop_is_under_way()
