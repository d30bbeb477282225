"""A million rows: read, checked, encoded and trained on for 20 steps, in bounded memory.

    python benchmarks/million_rows.py                  about five minutes on two cores
    python benchmarks/million_rows.py --rows 100000

Three runs of ``sft_lora.py`` on a tiny random model: our own 2,333 rows, the million, and the
million again, which must come from the cache.  Exits with 1 when the million takes more than 1.5 GB
beyond the small run, or its second start more than 5 seconds for the data.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

SPECIAL = ["<|pad|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"]
MOST_MORE_MEMORY = 1.5e9
MOST_SECONDS = 5.0


@dataclass
class Measured:
    """One run: wall time, time until the examples were there, peak resident memory."""

    name: str
    seconds: float
    data_seconds: float
    data_line: str
    peak_bytes: int


def main() -> int:
    """Generate, run three times, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "outputs/million_rows")
    parser.add_argument(
        "--keep", action="store_true", help="leave rows, cache and runs in the folder"
    )
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    ours = our_rows()
    make_base(args.folder / "base", ours)
    rows = write_rows(args.folder / "rows.jsonl", ours, args.rows)
    small = str(REPOSITORY / "data/sft_train")
    runs = [run("small", small, args.folder), run("first", str(rows), args.folder),
            run("second", str(rows), args.folder)]  # fmt: skip
    good = report(runs, args.rows, rows)
    if not args.keep:
        shutil.rmtree(args.folder)
    return 0 if good else 1


def our_rows() -> list[dict]:
    """The single-turn rows that ship with the repository."""
    text = (REPOSITORY / "data/sft_train/sft_data.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def write_rows(path: Path, ours: list[dict], number: int) -> Path:
    """Write rows that are all different: a question with a number, and two answers joined."""
    dice = random.Random(0)
    with path.open("w", encoding="utf-8") as out:
        for i in range(number):
            asked, other = dice.choice(ours), dice.choice(ours)
            row = {
                "question": f"{asked['question']}{i}",
                "answer": asked["answer"] + other["answer"],
            }
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def make_base(folder: Path, ours: list[dict]) -> None:
    """A two-layer random llama with a small tokenizer of the family's form."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator((row["question"] + row["answer"] for row in ours), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=SPECIAL[0], eos_token=SPECIAL[1],
        additional_special_tokens=SPECIAL[2:], clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4000, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def run(name: str, dataset: str, folder: Path) -> Measured:
    """Train 20 steps in a process of its own, and measure it."""
    command = [
        sys.executable, str(REPOSITORY / "sft_lora.py"), "--base_model_path", str(folder / "base"),
        "--dataset", dataset, "--eval_dataset", "auto", "--eval_share", "0.001",
        "--output_dir", str(folder / f"run_{name}"), "--overwrite_output_dir", "True",
        "--data_cache", str(folder / "cache"), "--max_steps", "20", "--eval_strategy", "no",
        "--use_cpu", "True", "--num_sample_replies", "0",
    ]  # fmt: skip
    print(f"{name}: {' '.join(command[1:4])} ...", flush=True)
    with tempfile.TemporaryFile("w+") as log:
        started = time.monotonic()
        process = os.posix_spawn(
            sys.executable, command, os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, log.fileno(), fd) for fd in (1, 2)],
        )  # fmt: skip
        _, status, usage = os.wait4(process, 0)
        seconds = time.monotonic() - started
        log.seek(0)
        text = log.read()
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{name}: the run failed:\n{text[-3000:]}")
    found = re.search(r"^  ((?:prepared|from the cache).*? in ([\d.]+) s.*)$", text, re.MULTILINE)
    line, data_seconds = (found[1], float(found[2])) if found else ("prepared in memory", 0.0)
    scale = 1 if sys.platform == "darwin" else 1024
    return Measured(name, seconds, data_seconds, line, usage.ru_maxrss * scale)


def report(runs: list[Measured], number: int, rows: Path) -> bool:
    """Print what was measured; whether it is within the bounds."""
    small, _, second = runs
    print(f"\n{number:,} rows, {rows.stat().st_size / 1e6:,.0f} MB, {os.cpu_count()} cores\n")
    print("| run | wall, s | data, s | peak memory, MB | beyond the small run, MB |")
    print("|---|---|---|---|---|")
    for one in runs:
        more = (one.peak_bytes - small.peak_bytes) / 1e6
        print(f"| {one.name} | {one.seconds:.1f} | {one.data_seconds:.1f} | "
              f"{one.peak_bytes / 1e6:,.0f} | {more:+,.0f} |")  # fmt: skip
    most = max(one.peak_bytes for one in runs) - small.peak_bytes
    hit = "from the cache" in second.data_line or number < 20_000
    good = most <= MOST_MORE_MEMORY and second.data_seconds <= MOST_SECONDS and hit
    print(
        f"\n{'within' if good else 'NOT within'} {MOST_MORE_MEMORY / 1e9} GB and {MOST_SECONDS} s"
    )
    return good


if __name__ == "__main__":
    sys.exit(main())
