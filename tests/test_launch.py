"""Real launches of several processes: the same losses and adapter as one, and one line when not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import launch_equality as equality


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """``(base, rows, folder, run)`` of the training that all launches are compared with."""
    folder = tmp_path_factory.mktemp("launch")
    base, rows = equality.make_base(folder / "base"), equality.make_rows(folder)
    return base, rows, folder, equality.train(equality.launches()[0], base, rows, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2 processes, DDP", "2 processes, ZeRO-3"])
def test_two_processes_equal_one(one_process, name):
    base, rows, folder, one = one_process
    launch = next(launch for launch in equality.launches() if launch.name == name)
    two = equality.train(launch, base, rows, folder)
    found = equality.differences(one, two)
    assert max(found.values()) <= equality.TOLERANCE, found
    assert len(equality.losses(one, "loss")) == 6  # two epochs of 19 rows in steps of 8


@pytest.mark.slow
def test_processes_that_would_train_alone_stop_with_one_line(one_process, tmp_path):
    """torchrun without a GPU and without --use_cpu True: two trainings in one folder, if unchecked."""
    base, rows, *_ = one_process
    words = ["-m", "tinyllm.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
             "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
             "sft_lora.py", "--base_model_path", str(base), "--dataset", str(rows),
             "--output_dir", str(tmp_path / "run")]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, capture_output=True, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert "add --use_cpu True" in errors[0] and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
