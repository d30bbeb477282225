"""A GGUF file in llama.cpp against its base in transformers (float32), as a row of a Markdown table.

    python -m benchmarks.gguf_check BASE FILE.gguf                                the base alone
    python -m benchmarks.gguf_check BASE FILE.gguf --adapter RUN                  merged into the file
    python -m benchmarks.gguf_check BASE FILE.gguf --adapter RUN --lora LORA.gguf applied by llama.cpp

Compared are ids (of held-out Chinese rows, the English README, this project's code, runs of spaces),
greedy replies without penalty to a few held-out questions, and the logits at every position of those
questions, each with the reply of transformers, and of one long text.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.chat_speed_llama import Llama, llama_package
from tinyllm.adapter import load_adapter_on_base
from tinyllm.base import context_length, load_base
from tinyllm.certificate import REPLY_TOKENS, Comparison, compare, logits_of
from tinyllm.chat_format import chat_format_of
from tinyllm.decode.plain import PlainEngine
from tinyllm.errors import UserError, run_program
from tinyllm.generate import reply_config
from tinyllm.json_lines import read_lines
from tinyllm.quiet import quiet_libraries

HELD_OUT = Path("data/sft_eval/sft_heldout.jsonl")
ENGLISH, CODE = Path("README_en.md"), Path("tinyllm/export")
LONG_TEXT_TOKENS = 600  # more than Gemma's window of 512
NUM_QUESTIONS, MOST_SPACES = 8, 79
HEADER = (
    "| file in llama.cpp | equal ids | equal replies | logits, largest difference / spread "
    "| mean KL, nats | equal choices |\n|---|---|---|---|---|---|"
)


def parse_arguments() -> argparse.Namespace:
    """The command line; a UserError for a missing file, or a LoRA with nothing to compare it with."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", help="folder of the base")
    parser.add_argument("gguf", type=Path, help="GGUF file of the base, or of base and adapter")
    parser.add_argument("--adapter", help="adapter folder, put beside the base in transformers")
    parser.add_argument("--lora", type=Path, help="GGUF LoRA of the adapter, for llama.cpp")
    arguments = parser.parse_args()
    for path in filter(None, (arguments.gguf, arguments.lora, HELD_OUT)):
        if not path.is_file():
            raise UserError(f"{path} is not a file (run this in the repository's folder)")
    if arguments.lora and not arguments.adapter:
        raise UserError("--lora needs --adapter, the folder that the GGUF LoRA was written from")
    return arguments


def load_reference(base: str, adapter: str | None):
    """``(model, tokenizer)`` of transformers, in float32 on the CPU, the adapter beside the base."""
    if adapter is None:
        return load_base(base, torch.float32, "cpu")
    return load_adapter_on_base(base, adapter, "cpu", "float32")


def load_llama(arguments: argparse.Namespace, ends: set[int], num_tokens: int) -> Llama:
    """llama.cpp with the file, keeping the logits of up to ``num_tokens`` positions."""
    threads = torch.get_num_threads()
    options = {"n_ctx": num_tokens, "n_threads": threads, "n_threads_batch": threads}
    lora = str(arguments.lora) if arguments.lora else None
    try:
        return Llama(arguments.gguf, ends, logits_all=True, lora_path=lora, **options)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"llama.cpp cannot load {arguments.gguf}: {error}") from error


def texts_to_encode(rows: list[dict]) -> Iterator[str]:
    """Texts whose ids must be equal: Chinese, English, code, and runs of spaces."""
    yield from (row[part] for row in rows for part in ("question", "answer"))
    for file in (ENGLISH, *sorted(CODE.glob("*.py"))):
        yield from file.read_text(encoding="utf-8").split("\n\n")
    for count in range(1, MOST_SPACES + 1):
        yield from (f"a{' ' * count}b", f"{' ' * count}你好{' ' * count}")


def other_ids(tokenizer, llama: Llama, texts: list[str]) -> list[str]:
    """The texts of which llama.cpp gives other ids, the beginning token included."""
    encode = llama.model.tokenize
    return [t for t in texts if tokenizer(t).input_ids != encode(t.encode(), True, special=True)]


def ask(model, tokenizer, rows: list[dict]) -> tuple[list[list[int]], list[list[int]], set[int]]:
    """Ids of some questions' prompts, transformers' greedy replies, and the ids that end one."""
    chat_format, engine = chat_format_of(tokenizer), PlainEngine(model)
    questions = [row["question"] for row in rows[:: len(rows) // NUM_QUESTIONS + 1]]
    prompts = [chat_format.encode_prompt([{"role": "user", "content": q}]) for q in questions]
    greedy = {"do_sample": False, "repetition_penalty": 1.0}
    longest = max(map(len, prompts))
    config = reply_config(model, tokenizer, chat_format, longest, REPLY_TOKENS, **greedy)
    return prompts, [engine.write(p, config) for p in prompts], set(config.eos_token_id)


def compare_logits(model, llama: Llama, probes: list[list[int]]) -> Comparison:
    """Both models' logits at every position of the probes, ``(N, V)`` each."""
    reference, found = logits_of(model, [torch.tensor([ids]) for ids in probes]), []
    if llama.model.n_vocab() != reference.shape[1]:
        tokens = f"{llama.model.n_vocab()} tokens, not {reference.shape[1]}"
        raise UserError(f"the GGUF file is of another base: it has {tokens}")
    for ids in probes:
        llama.model.reset()
        llama.model.eval(ids)
        found.append(torch.tensor(llama.model.scores[: len(ids)]))  # a copy: the next overwrites it
    return compare(reference, torch.cat(found))


def main() -> None:
    """Compare, and print the row."""
    arguments = parse_arguments()
    llama_package("gguf_check")
    quiet_libraries()
    model, tokenizer = load_reference(arguments.base, arguments.adapter)
    rows = read_lines(HELD_OUT)
    prompts, replies, ends = ask(model, tokenizer, rows)
    long_text = tokenizer("\n".join(row["answer"] for row in rows)).input_ids
    long_text = long_text[: min(LONG_TEXT_TOKENS, context_length(model))]
    room = max(len(long_text), max(map(len, prompts)) + REPLY_TOKENS)
    llama, texts = load_llama(arguments, ends, room), list(texts_to_encode(rows))
    others = other_ids(tokenizer, llama, texts)
    pairs = list(zip(prompts, replies, strict=True))
    same = sum(llama.write(prompt, REPLY_TOKENS) == reply for prompt, reply in pairs)
    found = compare_logits(model, llama, [p + r for p, r in pairs] + [long_text])
    files = " and ".join(path.name for path in (arguments.gguf, arguments.lora) if path)
    print(
        f"{HEADER}\n| {files} | {len(texts) - len(others)} of {len(texts)} | {same} of {len(pairs)} "
        f"| {found.relative:.1e} | {found.mean_kl:.1e} "
        f"| {found.greedy_agreement:.1%} of {found.num_positions} |"
    )
    if others:
        print(f"\nthe first text with other ids: {others[0]!r}")


if __name__ == "__main__":
    sys.exit(run_program(main))
