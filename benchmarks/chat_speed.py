"""How fast does the chat answer, beside transformers' generate on the same machine?

    python benchmarks/chat_speed.py --base_model BASE --lora_model RUN [--parts decode,batch,start]

decode  one conversation: tokens per second, and how many replies are the very same ids
batch   a file of questions: questions per second, side by side against one by one with generate
start   from the command to the first character, against importing torch and transformers and
        loading the base
llama   one conversation beside llama.cpp with the same merged model (only when asked for: its Python
        package must be there)

What is compared runs in turns in one process (start: one process each), and the median counts.
generate gets the merged model, its fastest form.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from chat_speed_llama import measure_llama  # noqa: E402

from tinyllm.errors import UserError, run_program  # noqa: E402

QUESTIONS = Path(__file__).with_name("first_chat.jsonl")
LOAD_ONLY = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
AutoTokenizer.from_pretrained(sys.argv[1])
print("loaded", flush=True)
"""


class Pair:
    """The adapter behind the chat's engine, and the merged model behind generate."""

    def __init__(self, base: str, adapter: str) -> None:
        import copy

        from tinyllm.adapter import load_adapter_on_base, merge
        from tinyllm.chat_format import chat_format_of
        from tinyllm.decode import kernel
        from tinyllm.decode.pick import EngineMaker

        lora, self.tokenizer = load_adapter_on_base(base, adapter, "cpu", "float32")
        self.model, self.lora = merge(copy.deepcopy(lora)), lora
        self.chat_format = chat_format_of(self.tokenizer)
        self.maker = EngineMaker(lora, "fast", kernel.load)
        self.engine = self.maker.engine("default")
        questions = QUESTIONS.read_text(encoding="utf-8").splitlines()
        self.prompts = [self.prompt(json.loads(line)["question"]) for line in questions]

    def prompt(self, question: str) -> list[int]:
        from tinyllm.chat_format import DEFAULT_SYSTEM_PROMPT

        system = {"role": "system", "content": DEFAULT_SYSTEM_PROMPT}
        return self.chat_format.encode_prompt([system, {"role": "user", "content": question}])

    def config(self, max_new_tokens: int, **options):
        from tinyllm.generate import reply_config

        return reply_config(
            self.model, self.tokenizer, self.chat_format, 100, max_new_tokens, **options
        )

    def generate(self, prompt: list[int], config) -> list[int]:
        import torch

        ids = torch.tensor([prompt])
        with torch.inference_mode():
            output = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config
            )
        return output[0, len(prompt) :].tolist()


def megabytes(pair: Pair) -> tuple[float, float]:
    """Weights that the engine reads for a token, in the form in which it keeps them, and that generate
    reads of the merged model.
    """
    import torch

    if pair.maker.compact is None:
        raise UserError(
            "there is no C compiler here, so the engine to be measured is not the fast one"
        )
    kept = [stored.weight.nbytes for _, stored in pair.maker.compact.copies.values()]
    adapter = [p.nbytes for name, p in pair.lora.named_parameters() if "lora_" in name]
    linear = [m.weight.nbytes for m in pair.model.modules() if isinstance(m, torch.nn.Linear)]
    return sum(kept + adapter) / 1e6, sum(linear) / 1e6


def seconds(do: Callable[[], object]) -> float:
    started = time.perf_counter()
    do()
    return time.perf_counter() - started


def in_turns(repeats: int, **ways: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each way."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, do in ways.items():
            taken[name].append(seconds(do))
    return {name: median(times) for name, times in taken.items()}


def measure_decode(pair: Pair, repeats: int, num_tokens: int) -> None:
    """Speed over replies of equal length; equality over whole replies to real questions."""
    import torch

    kinds = {
        "greedy, the base's own options": {},
        "greedy, repetition penalty 1.1": {"repetition_penalty": 1.1},
        "sampled": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    }
    print(f"decode, {num_tokens} tokens each; engine {pair.engine.why}")
    ours, theirs = megabytes(pair)
    print(f"  a token reads {ours:.1f} MB of weights here, {theirs:.1f} MB in generate")
    for kind, options in kinds.items():
        endless = pair.config(num_tokens, **options)
        endless.eos_token_id = None
        prompt = pair.prompts[0]
        taken = in_turns(
            repeats,
            fast=lambda p=prompt, c=endless: pair.engine.write(p, c),
            generate=lambda p=prompt, c=endless: pair.generate(p, c),
        )
        config, same = pair.config(200, **options), 0
        asked = pair.prompts[:: max(1, len(pair.prompts) // 40)]
        for seed, one in enumerate(asked):
            torch.manual_seed(seed)
            expected = pair.generate(one, config)
            torch.manual_seed(seed)
            same += pair.engine.write(one, config) == expected
        print(
            f"  {kind:32} fast {num_tokens / taken['fast']:6.0f} tokens/s   generate "
            f"{num_tokens / taken['generate']:6.0f}   ratio {taken['generate'] / taken['fast']:5.2f}   "
            f"same ids in {same} of {len(asked)} replies   "
            f"{ours * num_tokens / taken['fast'] / 1e3:.0f} and "
            f"{theirs * num_tokens / taken['generate'] / 1e3:.0f} GB/s",
            flush=True,
        )


def measure_batch(pair: Pair, repeats: int) -> None:
    """Whole replies to all questions side by side, against a sample of them one by one."""
    config, prompts = pair.config(200), pair.prompts
    one_by_one = prompts[:: max(1, len(prompts) // 20)]
    replies: dict[int, list[int]] = {}
    taken = in_turns(
        repeats,
        together=lambda: pair.engine.write_many(prompts, config, replies.__setitem__),
        alone=lambda: [pair.generate(p, config) for p in one_by_one],
    )
    expected = {i: pair.generate(p, config) for i, p in enumerate(prompts)}
    together, alone = len(prompts) / taken["together"], len(one_by_one) / taken["alone"]
    print(
        f"batch\n  {len(prompts)} questions together {together:6.1f} per s   one by one with generate "
        f"{alone:6.1f}   ratio {together / alone:5.1f}   same ids in "
        f"{sum(replies[i] == ids for i, ids in expected.items())} of {len(prompts)} replies",
        flush=True,
    )


def first_output(command: list[str]) -> float:
    """Seconds until a command writes its first byte."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout.read(1), "the command wrote nothing"
        taken = time.perf_counter() - started
        process.stdout.read()
    return taken


def measure_start(base: str, adapter: str, repeats: int) -> None:
    """Time to the first character, each in a fresh process."""
    chat = [sys.executable, "inference_lora.py", "--base_model", base, "--lora_model", adapter,
            "--merge_weights", "--prompt", "你好"]  # fmt: skip
    load = [sys.executable, "-c", LOAD_ONLY, base]
    first_output(chat)  # compiles the kernel where that has never been done
    taken = {"chat": [], "load": []}
    for _ in range(repeats):
        taken["load"].append(first_output(load))
        taken["chat"].append(first_output(chat))
    chat_s, load_s = median(taken["chat"]), median(taken["load"])
    print(
        f"start\n  to the first character {chat_s:.2f} s   imports and base alone {load_s:.2f} s   "
        f"ratio {chat_s / load_s:.2f}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--lora_model", required=True)
    parser.add_argument("--parts", default="decode,batch,start")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--num_tokens", type=int, default=100)
    args = parser.parse_args()
    from tinyllm.quiet import quiet_libraries

    quiet_libraries()
    parts = args.parts.split(",")
    base, adapter = str(Path(args.base_model).resolve()), str(Path(args.lora_model).resolve())
    unknown = set(parts) - {"decode", "batch", "start", "llama"}
    if unknown:
        raise UserError(f"--parts {unknown.pop()}: expected some of decode, batch, start, llama")
    if {"decode", "batch", "llama"} & set(parts):
        pair = Pair(base, adapter)
        if "decode" in parts:
            measure_decode(pair, args.repeats, args.num_tokens)
        if "batch" in parts:
            measure_batch(pair, max(1, args.repeats // 2))
        if "llama" in parts:
            measure_llama(pair, in_turns, args.repeats, args.num_tokens)
    if "start" in parts:
        measure_start(base, adapter, args.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
