"""What do 8 and 4 bits cost?  Logits, loss and replies of one model, quantised and not.

    pip install -r requirement-quant.txt
    python benchmarks/quantize_cost.py --base_model BASE --lora_model RUN

Every kind meets the same held-out rows.  The reference is the merged model in float32.  Columns:
size of the weights; mean KL divergence from the reference and share of positions with the same
likeliest token, over the positions that are learned; loss there, in nats per token; share of the
questions whose greedy reply is letter for letter the reference's; seconds for all replies.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tinyllm.chat_format import DEFAULT_SYSTEM_PROMPT, chat_format_of, with_system_prompt
from tinyllm.errors import run_program

ROWS = Path(__file__).resolve().parent.parent / "data" / "sft_eval" / "sft_heldout.jsonl"
KINDS = ("float32", "bfloat16", "int8", "int4")
REPLY_TOKENS = 64


@dataclass
class Measured:
    """What one kind was measured to do: logits ``(N, V)`` at learned positions, and replies."""

    megabytes: float
    logits: torch.Tensor
    loss: float
    replies: list[str]
    seconds: float


def load(args: argparse.Namespace, kind: str):
    """``(model, tokenizer)`` of one kind."""
    from load_lora_model import load_lora_model
    from tinyllm.base import load_base
    from tinyllm.quantize import KINDS as QUANTISED
    from tinyllm.quantize import quantize

    dtype = "float32" if kind in QUANTISED else kind
    if args.lora_model:
        model, tokenizer = load_lora_model(args.base_model, args.lora_model, "cpu", dtype)
    else:
        model, tokenizer = load_base(args.base_model, getattr(torch, dtype))
    return (quantize(model, kind) if kind in QUANTISED else model), tokenizer


@torch.no_grad()
def measure(model, tokenizer, rows: list[list[dict]]) -> Measured:
    """Run one model over the rows."""
    from tinyllm.generate import generate_reply

    chat_format, logits, loss, count = chat_format_of(tokenizer), [], 0.0, 0
    for messages in rows:
        encoded = chat_format.encode(messages)
        found = model(input_ids=torch.tensor([encoded.input_ids])).logits[0, :-1].float()
        learned = torch.tensor(encoded.supervised[1:])
        targets = torch.tensor(encoded.input_ids[1:])[learned]
        logits.append(found[learned])
        loss += torch.nn.functional.cross_entropy(found[learned], targets, reduction="sum").item()
        count += len(targets)
    start = time.perf_counter()
    replies = [
        generate_reply(model, tokenizer, chat_format, messages[:-1],
                       max_new_tokens=REPLY_TOKENS, do_sample=False).text
        for messages in rows
    ]  # fmt: skip
    seconds = time.perf_counter() - start
    return Measured(size_of(model), torch.cat(logits), loss / count, replies, seconds)


def size_of(model) -> float:
    """Megabytes of the weights in memory, scales included, tied weights once."""
    seen = {}
    for tensor in model.parameters():
        seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        for part in vars(getattr(tensor, "quant_state", None) or argparse.Namespace()).values():
            if isinstance(part, torch.Tensor):
                seen[part.data_ptr()] = part.numel() * part.element_size()
        scales = getattr(tensor, "SCB", None)
        if scales is not None:
            seen[scales.data_ptr()] = scales.numel() * scales.element_size()
    return sum(seen.values()) / 1e6


def row(kind: str, found: Measured, reference: Measured) -> str:
    """One line of the table."""
    from tinyllm.certificate import compare

    far = compare(reference.logits, found.logits)
    same = sum(a == b for a, b in zip(found.replies, reference.replies, strict=True))
    return (
        f"| {kind} | {found.megabytes:.1f} MB | {far.mean_kl:.2e} | {far.greedy_agreement:.2%} | "
        f"{found.loss:.4f} | {same} of {len(found.replies)} | {found.seconds:.1f} s |"
    )


def conversations(path: Path, limit: int) -> list[list[dict]]:
    """The first rows of a file of questions and answers, as conversations."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:limit]]
    return [
        with_system_prompt(
            [
                {"role": "user", "content": r["question"]},
                {"role": "assistant", "content": r["answer"]},
            ],
            DEFAULT_SYSTEM_PROMPT,
        )
        for r in rows
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--lora_model", help="without it the base alone")
    parser.add_argument("--num_rows", type=int, default=170)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    args = parser.parse_args()
    from tinyllm.quiet import quiet_libraries

    quiet_libraries()
    rows = conversations(ROWS, args.num_rows)
    reference = measure(*load(args, "float32"), rows)
    print("| weights | size | mean KL | same choice | loss | same replies | time |")
    print("|---|---|---|---|---|---|---|")
    for kind in args.kinds:
        found = reference if kind == "float32" else measure(*load(args, kind), rows)
        print(row(kind, found, reference), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
