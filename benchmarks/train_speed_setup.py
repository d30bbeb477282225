"""What train_speed.py needs before it measures: the peers' environment, bases, encoded rows."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from train_speed_jobs import (
    BENCHMARKS,
    CANDIDATES,
    REPOSITORY,
    SEED,
    SHAPES,
    Runner,
    Shape,
    Work,
    choose_rows,
    our_words,
)

from tinyllm.errors import UserError

REQUIREMENT = BENCHMARKS / "requirement-peers.txt"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def peers_environment(outputs: Path) -> Path:
    """The Python of the peers' own environment, made or brought up to date if need be.

    Raises:
        UserError: it cannot be made.
    """
    folder = outputs / "peers-venv"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted, stamp = REQUIREMENT.read_text(encoding="utf-8"), folder / REQUIREMENT.name
    if python.exists() and stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    say(f"making the peers' environment in {folder}, once ...")
    install = [str(python), "-m", "pip", "install", "--quiet", "-r", str(REQUIREMENT)]
    for command in ([sys.executable, "-m", "venv", str(folder)], install):
        if subprocess.run(command, check=False).returncode != 0:
            raise UserError(f"{folder}: '{' '.join(command[1:4])} ...' has failed, see above")
    stamp.write_text(wanted, encoding="utf-8")
    return python


def base_of(shape: Shape, embedded: Path, runner: Runner) -> Path:
    """The folder of a shape's base; random weights, except for an embedded base that is there.

    All bases share the tokenizer of the embedded one, so every tool and shape sees the same ids.
    """
    has_embedded = (embedded / "config.json").is_file()
    if shape.name == "embedded" and has_embedded:
        return embedded
    folder = runner.outputs / "bases" / "embedded-random"
    tokenizer = embedded if has_embedded else None
    if shape.name != "embedded":
        tokenizer = tokenizer or base_of(SHAPES["embedded"], embedded, runner)
        digest = hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()
        folder = folder.with_name(f"{shape.name}-{digest[:8]}")
    if not (folder / "config.json").is_file():
        make_base(shape, folder, tokenizer, runner)
    return folder


def make_base(shape: Shape, folder: Path, tokenizer: Path | None, runner: Runner) -> None:
    """A base with random weights; without a tokenizer one is learned from the repository's text."""
    say(f"making a base of shape {shape.name} with random weights ...")
    folder.parent.mkdir(parents=True, exist_ok=True)
    texts = sorted((REPOSITORY / "data" / "sft_train").glob("*.jsonl"))
    texts += sorted((REPOSITORY / "data" / "pretrain").glob("*.txt"))
    runner.project(
        "base", folder=str(folder), tokenizer=str(tokenizer) if tokenizer else None, seed=SEED,
        texts=[str(text) for text in texts], shape=shape.config,
    )  # fmt: skip


def prepare_work(
    base: Path, dataset: list[Path], num_rows: int, dropout: float, runner: Runner, name: str
) -> Work:
    """Choose and encode the rows of one comparison."""
    folder = runner.outputs / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    work = Work(base, folder / f"{name}.jsonl", folder / f"{name}.json", dropout)
    lines = choose_rows(dataset, num_rows)
    work.dataset.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    encode(work, runner)
    return work


def encode(work: Work, runner: Runner) -> None:
    """Write the ids and labels of ``work.dataset`` to ``work.encoded``."""
    words = our_words(CANDIDATES[0], work, 1, 1, runner.outputs / "runs" / "none")
    encoded = runner.project("encode", words=words)
    work.encoded.write_text(json.dumps(encoded), encoding="utf-8")


def mean_lengths(work: Work) -> tuple[float, float]:
    """``(tokens, supervised tokens)`` of a mean row."""
    rows = json.loads(work.encoded.read_text(encoding="utf-8"))
    tokens = sum(map(len, rows["input_ids"]))
    supervised = sum(label != -100 for labels in rows["labels"] for label in labels)
    return tokens / len(rows["labels"]), supervised / len(rows["labels"])
