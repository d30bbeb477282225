"""How well the plan foresees memory: expected against measured peak, over a few shapes.

    python benchmarks/memory_estimate.py                  a few shapes and batch sizes, 6 steps each
    python benchmarks/memory_estimate.py --steps 2 --shapes small
    python benchmarks/memory_estimate.py --base path/to/base     one more shape: a real base

Each run is a process of its own (the peak of a process never falls), started as a user starts it, on
the CPU or on the first GPU.  Bases have random weights.  Writes outputs/bench/memory_estimate.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = 0.25
# hidden, layers, feed-forward, words, and further settings of the run
SHAPES = {
    "small": (256, 4, 704, 12000, ()),
    "embedded": (384, 8, 1024, 12000, ()),
    "embedded, whole logits": (384, 8, 1024, 12000, ("--chunked_loss", "False")),
    "many words": (512, 4, 1376, 64798, ("--chunked_loss", "False")),
    "full training": (384, 8, 1024, 12000, ("--use_lora", "False", "--learning_rate", "1e-4")),
    "large": (768, 12, 2048, 32000, ()),
}


def main() -> int:
    args = parse_args()
    sys.path.insert(0, str(ROOT))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.shapes:
            base = Path(scratch) / name.replace(" ", "_").replace(",", "")
            make_base(base, SHAPES[name])
            rows.append(compare(name, base, SHAPES[name][4], args.steps, Path(scratch)))
            print(line(rows[-1]), flush=True)
        if args.base:
            rows.append(compare(args.base, Path(args.base), (), args.steps, Path(scratch)))
            print(line(rows[-1]), flush=True)
    write(rows)
    worst = max(abs(row["expected"] / row["measured"] - 1) for row in rows)
    print(f"largest error {worst:.0%}, aim {TARGET:.0%}")
    return 0 if worst <= TARGET else 1


def make_base(folder: Path, shape: tuple) -> None:
    """A llama with random weights and the embedded base's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    hidden, layers, feed_forward, words, _ = shape
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "ptm_tiny_llm_16m_epoch1")
    config = LlamaConfig(
        vocab_size=max(words, len(tokenizer)), hidden_size=hidden, num_hidden_layers=layers,
        intermediate_size=feed_forward, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64, max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def compare(name: str, base: Path, words: tuple, steps: int, scratch: Path) -> dict:
    """Run a few steps in a process of its own; expected and measured bytes."""
    output = scratch / f"run_{len(list(scratch.iterdir()))}"
    command = [
        sys.executable, "sft_lora.py", "--base_model_path", str(base), "--output_dir", str(output),
        "--max_steps", str(steps), "--report", "False", "--eval_replies", "0",
        "--num_sample_replies", "0", "--disable_tqdm", "True", "--eval_strategy", "no",
        "--save_strategy", "no", *words,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: the training failed:\n{done.stderr[-2000:]}")
    results = json.loads((output / "run.json").read_text())["results"]
    memory = results["plan"]["memory"]
    return {"name": name, "expected": memory["total"], "measured": results["peak_memory_bytes"],
            **{part: memory[part] for part in PARTS}}  # fmt: skip


PARTS = ("rest", "weights", "training", "activations", "logits")
HEAD = ("shape", "expected MiB", "measured MiB", "error", *PARTS)


def line(row: dict) -> str:
    """One row of the table."""
    error = row["expected"] / row["measured"] - 1
    cells = [row["name"], mib(row["expected"]), mib(row["measured"]), f"{error:+.0%}",
             *(mib(row[part]) for part in PARTS)]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"


def write(rows: list[dict]) -> None:
    target = ROOT / "outputs" / "bench" / "memory_estimate.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    head = f"| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}"
    target.write_text("\n".join([head, *map(line, rows)]) + "\n", encoding="utf-8")
    print(f"{head}\n" + "\n".join(map(line, rows)) + f"\n{target.relative_to(ROOT)}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps (%(default)s)")
    parser.add_argument("--base", help="folder of a base to measure as well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
