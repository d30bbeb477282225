"""Will it fit?  Memory on each GPU, line by line, and tokens per second:

    python -m tinyllm.gpu_memory                              0.5B, 1.5B and 7B bases on one GPU
    python -m tinyllm.gpu_memory --gpus 8 --shapes 7B
    python -m tinyllm.gpu_memory --base FOLDER --mbs 8 --max_length 2048

An estimate by counting (docs/memory.md says how good it is).  Nothing is loaded or trained.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tinyllm.base import read_json
from tinyllm.errors import UserError, run_program
from tinyllm.memory_model import (
    BYTES,
    SHAPES,
    Shape,
    Training,
    memory,
    stages,
    tokens_per_second,
)

GIB = 2**30


def shape_of(folder: Path) -> Shape:
    """Read a base's shape from its ``config.json``.

    Raises:
        UserError: it is no llama-like decoder.
    """
    config = read_json(folder / "config.json")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "vocab_size")  # fmt: skip
    missing = [name for name in names if not isinstance(config.get(name), int)]
    if missing:
        raise UserError(f"{folder}/config.json: no {', '.join(missing)}, so this cannot be counted")
    heads = config["num_attention_heads"]
    return Shape(
        folder.name, *(config[name] for name in names[:4]),
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        vocab_size=config["vocab_size"],
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        head_dim=config.get("head_dim") or 0,
    )  # fmt: skip


def table(shape: Shape, how: Training) -> str:
    """A markdown table: one line an engine, GiB on each GPU."""
    rows = {name: memory(shape, one) for name, one in stages(how).items()}
    names = list(next(iter(rows.values())))
    lines = [f"| engine | {' | '.join(names)} | together |", "|---" * (len(names) + 2) + "|"]
    for name, parts in rows.items():
        numbers = " | ".join(f"{parts[part] / GIB:.2f}" for part in names)
        lines.append(f"| {name} | {numbers} | **{sum(parts.values()) / GIB:.1f}** |")
    return "\n".join(lines)


def parse(words: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m tinyllm.gpu_memory", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    known = [shape.name for shape in SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=known, default=known)
    parser.add_argument("--base", type=Path, help="a base's folder, instead of --shapes")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--mbs", type=int, default=4, help="rows per GPU and micro-batch")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of the longest row")
    parser.add_argument("--learned", type=float, default=1.0, help="share of supervised tokens")
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--lora_dropout", type=float, default=0.1)
    parser.add_argument("--torch_dtype", choices=sorted(BYTES), default="bfloat16")
    parser.add_argument("--tflops", type=float, default=312.0, help="peak of one GPU (A100: 312)")
    parser.add_argument(
        "--utilisation", type=float, default=0.35, help="share of the peak, assumed"
    )
    args = parser.parse_args(words)
    for name in ("gpus", "mbs", "max_length", "lora_r", "tflops"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} {getattr(args, name)}: must be more than 0")
    for name in ("learned", "utilisation"):
        if not 0 < getattr(args, name) <= 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be above 0, and at most 1")
    return args


def main(words: list[str] | None = None) -> int:
    args = parse(words)
    shapes = [shape_of(args.base)] if args.base else [s for s in SHAPES if s.name in args.shapes]
    how = Training(
        args.mbs * args.max_length, args.lora_r, args.torch_dtype, args.learned, args.gpus,
        dropout=args.lora_dropout > 0,
    )  # fmt: skip
    print(
        f"GiB on each of {args.gpus} GPU(s), {how.tokens} tokens a micro-batch, {args.torch_dtype} base\n"
    )
    for shape in shapes:
        speed = tokens_per_second(shape, how, args.tflops * 1e12, args.utilisation)
        print(
            f"{shape.name}: {shape.parameters / 1e6:,.0f}M parameters, adapter of rank {args.lora_r} "
            f"{shape.lora_parameters(args.lora_r) / 1e6:,.1f}M; {speed:,.0f} tokens/s if "
            f"{args.utilisation:.0%} of {args.tflops:g} TFLOP/s is reached (assumed, not measured)\n\n"
            f"{table(shape, how)}\n"
        )
    print("Left out: the CUDA context (0.5 to 1 GiB), temporary buffers, fragmentation.")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
