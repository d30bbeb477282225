"""The same training by every launch: are losses and adapters the same?

    python benchmarks/launch_equality.py                    all launches, on the CPU, about ten minutes
    python benchmarks/launch_equality.py --only "2 processes, DDP"
    python benchmarks/launch_equality.py --devices gpu      on the GPUs of this machine

A tiny model and rows with answers of very different lengths are made on the spot; every launch goes
through ./script/sft_lora.sh, in float32, without dropout, with 8 rows a step.  19 training rows make
the last step of an epoch uneven.  Prints a table and writes outputs/bench/launch_equality.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

TOLERANCE = 1e-5
ROWS_PER_STEP = 8
NUM_TRAIN, NUM_HELD_OUT = 19, 5
SETTINGS = {
    "LORA_R": "4", "LORA_DROPOUT": "0", "LR": "5e-3", "PRECISION": "fp32",
    "TRAIN_EPOCHS": "2", "OMP_NUM_THREADS": "1",
}  # fmt: skip
WORDS = [
    "--lr_scheduler_type", "constant", "--warmup_steps", "0", "--logging_steps", "1",
    "--save_strategy", "epoch", "--num_sample_replies", "0", "--disable_tqdm", "True",
]  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One way to start the training: variables of the script, on one node or several."""

    name: str
    processes: int
    variables: dict[str, str] = field(default_factory=dict)
    nodes: int = 1


def launches() -> list[Launch]:
    """Every launch, the one that all are compared with first."""
    deepspeed = {"USE_DEEPSPEED": "1"}
    found = [Launch("1 process", 1), Launch("2 processes, DDP", 2)]
    for stage in "0123":
        for processes in (1, 2):
            what = f"{processes} process{'es' if processes > 1 else ''}, ZeRO-{stage}"
            found.append(Launch(what, processes, deepspeed | {"ZERO_STAGE": stage}))
    for stage in "23":
        zero = deepspeed | {"ZERO_STAGE": stage, "OFFLOAD": "1"}
        found.append(Launch(f"2 processes, ZeRO-{stage}, offloading", 2, zero))
    found.append(Launch("2 nodes, DDP", 2, nodes=2))
    for stage in "23":
        zero = deepspeed | {"ZERO_STAGE": stage}
        found.append(Launch(f"2 nodes, ZeRO-{stage}", 2, zero, nodes=2))
    return found


def make_base(folder: Path) -> Path:
    """A two-layer llama with seeded random weights and the embedded base's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tinyllm.embedded import EMBEDDED

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=True, initializer_range=0.2, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(folder: Path) -> Path:
    """Training and held-out rows whose answers have from one to fifty words."""
    for name, first, last in (
        ("train", 0, NUM_TRAIN),
        ("eval", NUM_TRAIN, NUM_TRAIN + NUM_HELD_OUT),
    ):
        rows = [{"question": f"数到 {n}", "answer": "、".join(map(str, range(1 + n * n % 50)))}
                for n in range(first, last)]  # fmt: skip
        path = folder / f"rows_{name}" / "rows.jsonl"
        path.parent.mkdir(parents=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
    return folder / "rows_train"


def train(launch: Launch, base: Path, rows: Path, folder: Path, device: str = "cpu") -> Path:
    """Train by one launch; returns its run folder.

    Raises:
        RuntimeError: it failed; the message holds what it printed.
    """
    output = folder / launch.name.replace(" ", "_").replace(",", "")
    per_node = launch.processes // launch.nodes
    variables = SETTINGS | launch.variables | {
        "BASE_MODEL": str(base), "DATASET": str(rows), "OUTPUT_DIR": str(output), "DEVICE": device,
        "NPROC": str(per_node), "MBS": "2", "GAS": str(ROWS_PER_STEP // 2 // launch.processes),
    }  # fmt: skip
    if launch.nodes > 1:
        variables |= {"NNODES": str(launch.nodes), "MASTER_ADDR": "127.0.0.1"}
        variables |= {"MASTER_PORT": str(_free_port())}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    nodes = [
        subprocess.Popen(
            ["bash", str(REPOSITORY / "script" / "sft_lora.sh"), *WORDS], text=True,
            env=clean | variables | {"PATH": path, "NODE_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(launch.nodes)
    ]  # fmt: skip
    printed = [node.communicate()[0] for node in nodes]
    if any(node.returncode for node in nodes):
        raise RuntimeError(f"{launch.name} failed:\n" + "\n".join(printed))
    return output


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def losses(run: Path, name: str) -> list[float]:
    """Every logged value of ``loss`` or ``eval_loss``, in order."""
    lines = (run / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry[name] for entry in map(json.loads, lines) if name in entry]


def differences(first: Path, second: Path) -> dict[str, float]:
    """Largest absolute differences of two runs: step losses, held-out losses, adapter weights.

    Raises:
        ValueError: they do not have the same steps or tensors.
    """
    from tinyllm.adapter import read_adapter

    found = {}
    for name in ("loss", "eval_loss"):
        a, b = losses(first, name), losses(second, name)
        if len(a) != len(b) or not a:
            raise ValueError(f"{second}: {len(b)} values of {name}, expected {len(a)}")
        found[name] = max(abs(x - y) for x, y in zip(a, b, strict=True))
    a, b = read_adapter(first).weights, read_adapter(second).weights
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        raise ValueError(f"{second}: other tensors than {first}")
    found["adapter"] = max((a[name] - b[name]).abs().max().item() for name in a)
    return found


def report(runs: dict[str, Path]) -> str:
    """A markdown table of all runs against the first."""
    reference = next(iter(runs))
    lines = [
        f"| launch | steps | step loss | held-out loss | adapter | within {TOLERANCE:g} |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        found = differences(runs[reference], run)
        same = "yes" if max(found.values()) <= TOLERANCE else "NO"
        numbers = " | ".join(f"{value:.1e}" for value in found.values())
        lines.append(f"| {name} | {len(losses(run, 'loss'))} | {numbers} | {same} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", help="names of launches, beside the first")
    parser.add_argument("--devices", choices=("cpu", "gpu"), default="cpu")
    args = parser.parse_args()
    everything = launches()
    chosen = [one for one in everything[1:] if args.only is None or one.name in args.only]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base, rows = make_base(folder / "base"), make_rows(folder)
        runs = {}
        for launch in [everything[0], *chosen]:
            print(f"{launch.name} ...", file=sys.stderr, flush=True)
            runs[launch.name] = train(launch, base, rows, folder, args.devices)
        table = report(runs)
    print(table)
    target = REPOSITORY / "outputs" / "bench" / "launch_equality.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(table + "\n", encoding="utf-8")
    return 1 if "| NO |" in table else 0


if __name__ == "__main__":
    sys.exit(main())
