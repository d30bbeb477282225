"""The shell scripts as a user starts them: from anywhere, under any path, with any Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

TOOLS = ["bash", "dirname", "cat", "env", "uname", "mkdir", "chmod", "rm", "tee"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The tracked sources in a folder whose name has a space."""
    target = tmp_path_factory.mktemp("a clone") / "tiny llm"
    skip = shutil.ignore_patterns(".git", ".venv", "outputs", "__pycache__", ".*cache", "models")
    shutil.copytree(REPOSITORY, target, ignore=skip)
    return target


def start(script: Path, *words: str, cwd="/", path=None, **environment: str):
    path = path or f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        ["bash", str(script), *words], cwd=cwd, capture_output=True, text=True,
        env=clean | {"PATH": path, "CUDA_VISIBLE_DEVICES": ""} | environment, timeout=300,
    )  # fmt: skip


def training(clone, base, data, output, *words, **environment):
    settings = {"BASE_MODEL": base, "DATASET": data, "OUTPUT_DIR": output, "MBS": "2", "GAS": "1"}
    settings |= {"LORA_R": "4"} | environment
    return start(clone / "script/sft_lora.sh", "--num_sample_replies", "1", *words,
                 **{k: str(v) for k, v in settings.items()})  # fmt: skip


@pytest.mark.slow
def test_the_launcher_trains_and_says_how_to_chat(clone, base_folder, data_file, tmp_path):
    output = tmp_path / "my run"
    done = training(clone, base_folder, data_file, output, "--max_steps", "2", LR="1e-3")
    assert done.returncode == 0, done.stderr
    assert "no GPU found, so one process on the CPU" in done.stderr
    assert "installing" not in done.stderr and not (clone / ".venv").exists()
    assert (output / "adapter_model.bin").is_file()
    assert '"learning_rate": 0.001' in (output / "run.json").read_text()
    assert f'--lora_model "{output}"' in done.stdout and "python inference_lora.py" in done.stdout
    again = training(clone, base_folder, data_file, output, "--max_steps", "2", LR="1e-3")
    assert again.returncode == 0 and "nothing to do" in again.stderr
    other = training(clone, base_folder, data_file, output, "--max_steps", "2", LR="2e-3")
    assert other.returncode == 2 and "learning_rate was 0.001, is now 0.002" in other.stderr


def test_a_failed_step_is_a_non_zero_exit_also_through_tee(clone, base_folder, tmp_path):
    done = training(clone, base_folder, tmp_path / "none.jsonl", tmp_path / "run")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "no such data file" in errors[0] and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
    command = f"set -o pipefail; OUTPUT_DIR={tmp_path}/run BASE_MODEL=nowhere bash '{clone}/script/sft_lora.sh' | tee {tmp_path}/log"
    piped = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"})  # fmt: skip
    assert piped.returncode == 2 and "no such base folder" in piped.stderr


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("NPROC", "x", "expected auto or a number"),
        ("ZERO_STAGE", "7", "expected 0, 1, 2 or 3"),
        ("USE_DEEPSPEED", "yes", "expected auto, 0 or 1"),
        ("DEVICE", "gpu", "no GPU was found"),
        ("DEVICE", "tpu", "expected auto, cpu or gpu"),
        ("OFFLOAD", "2", "expected 0 or 1"),
        ("PRECISION", "int4", "expected auto, bf16, fp16 or fp32"),
        ("PRECISION", "fp16", "needs a GPU"),
        ("NNODES", "0", "expected a number"),
        ("NNODES", "2", "set MASTER_ADDR"),
        ("NODE_RANK", "1", "expected a number from 0 to 0"),
        ("MASTER_PORT", "x", "expected a number"),
        ("WORLD_SIZE", "8", "starts the processes itself"),
    ],
)
def test_bad_variables_are_one_clear_line(clone, base_folder, tmp_path, variable, value, message):
    done = training(clone, base_folder, tmp_path, tmp_path / "run", **{variable: value})
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def fake_tools(folder: Path, **programs: str) -> str:
    """A PATH with the named shell tools and nothing else but the given stand-ins."""
    folder.mkdir()
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name))
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return str(folder)


def test_an_old_python_gets_one_line(clone, tmp_path):
    path = fake_tools(
        tmp_path / "bin",
        python3='[[ $1 != --version ]] || { echo "Python 3.8.1"; exit 0; }; exit 1',
    )
    done = start(clone / "script/sft_lora.sh", path=path)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: Python 3.11 or newer is needed, found Python 3.8.1; install it first"
    )


def test_a_missing_venv_module_gets_one_line(clone, tmp_path):
    stand_in = (
        'case "$*" in *version_info*) exit 0;; *requirements_met*) echo "torch is not installed"; '
        "exit 1;; *) exit 1;; esac"
    )
    done = start(clone / "script/sft_lora.sh", path=fake_tools(tmp_path / "bin", python3=stand_in))
    assert done.returncode == 2
    assert done.stderr.strip().startswith("error: the Python module venv is missing; install it")


def test_a_missing_requirement_makes_a_venv_and_installs(clone, tmp_path):
    """With a stand-in for Python: what is installed, where, and that a second run installs nothing."""
    log = tmp_path / "log"
    stand_in = f"""
echo "$*" >> {log}
case "$*" in
  *requirements_met*) [[ -e {tmp_path}/installed ]] && exit 0; echo "peft is not installed"; exit 1;;
  "-m venv .venv") mkdir -p .venv/bin; cat "$0" > .venv/bin/python; chmod +x .venv/bin/python;;
  *"pip install"*) cat /dev/null > {tmp_path}/installed;;
  *sft_lora.py*) echo trained;;
esac
exit 0"""
    path = fake_tools(tmp_path / "bin", python3=stand_in)
    first = start(clone / "script/sft_lora.sh", path=path, BASE_MODEL="x")
    assert first.returncode == 0 and "trained" in first.stdout, first.stderr
    assert "peft is not installed" in first.stderr and "source .venv/bin/activate" in first.stderr
    assert "-m pip install -r requirement.txt" in log.read_text()
    log.write_text("")
    second = start(clone / "script/sft_lora.sh", path=path, BASE_MODEL="x")
    assert second.returncode == 0 and "pip install" not in log.read_text()
    shutil.rmtree(clone / ".venv")


def test_requirements_check_reads_pins_and_systems(tmp_path):
    file = tmp_path / "r.txt"
    file.write_text('# c\ntorch==0.0.1\nnothing-here==1; sys_platform == "plan9"\n')
    command = [sys.executable, str(REPOSITORY / "script/requirements_met.py"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "0.0.1 is asked for" in done.stdout
    assert "nothing-here" not in done.stdout
    file.write_text("torch>=2\n")
    assert "cannot read the line" in subprocess.run(command, capture_output=True, text=True).stderr


def test_every_script_is_executable_and_parses():
    for script in (REPOSITORY / "script").glob("*.sh"):
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
        if script.name not in ("env.sh", "launch.sh"):
            assert os.access(script, os.X_OK), script.name
