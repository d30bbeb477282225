"""What the launcher chooses, with stand-ins for the driver, for Python and for SLURM's tools."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_scripts import clone, fake_tools, start  # noqa: F401


class Machine:
    """A machine with given tools; ``launch`` is what would be started on it, and what is said."""

    def __init__(
        self, repository: Path, folder: Path, gpus=0, torch_gpus=None, bf16=1, deepspeed="", **tools
    ):
        seen = gpus if torch_gpus is None else torch_gpus
        probe = f"gpus={seen}\\nbf16={bf16}\\ntorch=9.9\\ndeepspeed={deepspeed}\\n"
        python = f"""
case "$*" in
  *requirements_met* | *version_info* | *tinyllm.embedded*) exit 0;;
  *launch_probe*) printf '{probe}'; exit 0;;
esac
echo "started: $*"
echo "asked: $TINYLLM_LAUNCH"
"""
        if gpus:
            tools["nvidia-smi"] = "".join(f'echo "GPU {n}: one"\n' for n in range(gpus))
        tools.setdefault("nproc", "echo 8")
        self.repository, self.path = repository, fake_tools(folder / "bin", python3=python, **tools)

    def launch(self, *words: str, **variables: str):
        variables = {
            "BASE_MODEL": "x",
            "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
            "OMP_NUM_THREADS": "",
        } | variables
        return start(self.repository / "script/sft_lora.sh", *words, path=self.path, **variables)


@pytest.fixture
def machine(clone, tmp_path):  # noqa: F811
    return lambda **what: Machine(clone, tmp_path, **what)


def says(done, *texts: str) -> None:
    assert done.returncode == 0, done.stderr
    for text in texts:
        assert text in done.stdout + done.stderr, (text, done.stdout, done.stderr)


def fails(done, text: str) -> None:
    assert done.returncode == 2 and done.stdout == ""
    assert text in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_laptop(machine):
    laptop = machine()
    done = laptop.launch()
    says(done, "no GPU found, so one process on the CPU, without DeepSpeed",
         "--use_cpu True", "asked: processes=1 device=cpu engine=single")  # fmt: skip
    assert "accelerate" not in done.stdout and "tinyllm.launch" not in done.stdout
    done = laptop.launch(NPROC="2")
    says(done, "2 processes on the CPU, with DDP", "--num_processes 2", "--multi_gpu",
         "--num_cpu_threads_per_process 4", "asked: processes=2 device=cpu engine=ddp")  # fmt: skip
    done = laptop.launch(NPROC="2", OMP_NUM_THREADS="1")
    says(done, "--num_cpu_threads_per_process 1")
    done = laptop.launch(USE_DEEPSPEED="1")
    says(done, "one process on the CPU, with DeepSpeed ZeRO-2", "configs/zero2.json",
         "asked: processes=1 device=cpu engine=deepspeed zero=2")  # fmt: skip
    says(laptop.launch(PRECISION="bf16"), "--torch_dtype bfloat16", "dtype=bfloat16")
    done = laptop.launch("--torch_dtype", "bfloat16")
    says(done, "asked: processes=1 device=cpu engine=single\n")


def test_gpus(machine):
    server = machine(gpus=2)
    done = server.launch("--max_steps", "3")
    says(done, "2 GPU(s) found, so 2 processes on the GPU, with DeepSpeed ZeRO-2, base in bfloat16",
         "--num_processes 2 --num_machines 1", "--max_steps 3",
         "--use_deepspeed --deepspeed_config_file configs/zero2.json",
         "asked: processes=2 device=cuda engine=deepspeed zero=2 dtype=bfloat16")  # fmt: skip
    assert "--use_cpu" not in done.stdout and "--multi_gpu" not in done.stdout
    done = server.launch(USE_DEEPSPEED="0")
    says(done, "2 processes on the GPU, with DDP, DeepSpeed turned off", "--multi_gpu")
    assert "deepspeed_config" not in done.stdout
    done = server.launch(NPROC="1", USE_DEEPSPEED="0")
    says(done, "one process on the GPU, DeepSpeed turned off", "engine=single")
    done = server.launch(ZERO_STAGE="3", OFFLOAD="1")
    says(done, "ZeRO-3 and offloading", "configs/zero3_offload.json", "--zero3_init_flag true")
    done = server.launch(PRECISION="fp16")
    says(done, "with DDP, without DeepSpeed (PRECISION=fp16)", "--torch_dtype float16 --fp16 True")
    says(server.launch(DEVICE="cpu"), "DEVICE=cpu, so one process on the CPU")
    says(server.launch(CUDA_VISIBLE_DEVICES="1"), "1 GPU(s) found, so one process on the GPU")
    says(server.launch(CUDA_VISIBLE_DEVICES="-1"), "no GPU found")
    fails(server.launch(NPROC="3"), "only 2 GPU(s) were found")
    fails(server.launch(ZERO_STAGE="3", USE_DEEPSPEED="0"), "need DeepSpeed")
    fails(server.launch(ZERO_STAGE="1", OFFLOAD="1"), "OFFLOAD=1 goes with ZERO_STAGE=2 or 3")
    fails(server.launch(PRECISION="fp16", USE_DEEPSPEED="1"), "trained without DeepSpeed")


def test_what_is_missing_steps_down_and_says_why(machine):
    broken = machine(gpus=2, deepspeed="MissingCUDAException: CUDA_HOME does not exist", bf16=0)
    done = broken.launch()
    says(done, "with DDP, without DeepSpeed (MissingCUDAException: CUDA_HOME does not exist)",
         "base in float32 (this GPU has no bf16)", "engine=ddp")  # fmt: skip
    says(broken.launch(NPROC="1"), "one process on the GPU, without DeepSpeed (Missing")
    fails(
        broken.launch(USE_DEEPSPEED="1"), "USE_DEEPSPEED=1: DeepSpeed cannot be used: MissingCUDA"
    )
    fails(broken.launch(ZERO_STAGE="3"), "DeepSpeed cannot be used")


def test_a_pytorch_that_does_not_see_the_gpus(machine):
    blind = machine(gpus=2, torch_gpus=0)
    says(
        blind.launch(),
        "2 GPU(s) found, but this PyTorch (9.9) cannot use them, so one process on the CPU",
    )
    fails(blind.launch(DEVICE="gpu"), "cannot use them; install a CUDA build")


def test_two_nodes(machine):
    node = machine(gpus=8)
    done = node.launch(NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1")
    says(done, "16 processes on the GPU (node 1 of 2, meeting at 10.0.0.1:29500)",
         "--num_processes 16 --num_machines 2 --main_process_port 29500",
         "--machine_rank 1 --main_process_ip 10.0.0.1", "--deepspeed_multinode_launcher standard",
         "asked: processes=16")  # fmt: skip


def test_slurm(machine):
    node = machine(
        gpus=4, scontrol='[[ "$*" == "show hostnames gpu[07-08]" ]] && echo gpu07 && echo gpu08'
    )
    job = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[07-08]",
           "SLURM_JOB_ID": "4711"}  # fmt: skip
    done = node.launch(SLURM_STEP_NUM_TASKS="2", **job)
    says(done, "8 processes on the GPU (node 1 of 2, meeting at gpu07:19711)", "--machine_rank 1")
    fails(node.launch(**job), "srun --ntasks-per-node=1 ./script/sft_lora.sh")
    fails(node.launch(SLURM_STEP_NUM_TASKS="8", **job), "start one task on each")
    says(node.launch(NNODES="1", **job), "4 processes on the GPU, with")
    assert "node" not in node.launch(SLURM_NNODES="1", SLURM_JOB_ID="1").stderr


def test_every_configuration_is_described_and_compiles_nothing(clone):  # noqa: F811
    import json

    from tinyllm.deepspeed_ops import compiled_optimizer

    described = set(re.findall(r"^- `(\S+)`", (clone / "configs/README.md").read_text(), re.M))
    files = {path.name for path in (clone / "configs").iterdir()} - {"README.md"}
    assert described == files
    for path in (clone / "configs").glob("*.json"):
        assert compiled_optimizer(json.loads(path.read_text())) is None, path.name
