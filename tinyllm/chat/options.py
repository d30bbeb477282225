"""The chat's command line."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tinyllm.base_settings import BASE_KINDS, add_license_flag
from tinyllm.errors import UserError

SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")
NEEDS_SAMPLING = {"temperature", "top_p", "top_k"}
AT_LEAST = {"max_length": 1, "max_new_tokens": 1, "top_k": 0}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the words of a command line.

    Raises:
        UserError: a value out of range, or flags that exclude each other.
    """
    args = _parser().parse_args(argv)
    for name, least in AT_LEAST.items():
        if (value := getattr(args, name)) is not None and value < least:
            raise UserError(f"--{name} {value}: must be {least} or more")
    for name, value in sampling_options(args).items():
        check_option(name, value)
    if args.base_model is None and not args.lora_model:
        raise UserError(
            "give --base_model a base folder or name, or --lora_model a run folder that names it"
        )
    if args.output and not args.input:
        raise UserError("--output needs --input, the file of questions")
    if args.input and not args.output:
        raise UserError("--input needs --output, the file for the answers")
    if sum(map(bool, (args.prompt is not None, args.input, args.web))) > 1:
        raise UserError("--prompt, --input and --web exclude each other")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Chat with a base and LoRA adapters.")
    add = parser.add_argument
    add(
        "--base_model", "--base_model_path",
        help=f"base: {BASE_KINDS} (default: the one the adapter names)",
    )  # fmt: skip
    add_license_flag(parser)
    add("--lora_model", "--lora_model_path", action="append", default=[], metavar="[NAME=]PATH",
        help="adapter folder; repeat it for several, /adapter NAME switches")  # fmt: skip
    add("--merge_weights", action="store_true", help="merge the adapter (faster)")
    add("--system_prompt", help="system prompt (default: the training's default)")
    add("--max_length", type=int, default=512, help="longest prompt in tokens")
    add("--max_new_tokens", type=int, default=256, help="longest reply in tokens")
    add("--temperature", type=float, help="sample with this temperature")
    add("--top_p", type=float, help="sample from this share of the probability")
    add("--top_k", type=int, help="sample from this many likeliest tokens, 0 for all")
    add("--repetition_penalty", type=float, help="over 1 discourages repeating")
    add("--greedy", action="store_true", help="always take the likeliest token")
    add("--seed", type=int, help="make sampled replies reproducible")
    add("--compare", action="store_true", help="show the base's reply before the adapter's")
    add("--stats", action="store_true", help="say after each reply how long it took")
    add("--prompt", help="answer this one question and leave")
    add("--input", help="answer the questions of a .jsonl file; goes on where it was stopped")
    add("--output", help="the .jsonl file for the answers of --input")
    add("--json", action="store_true", help="print replies as JSON lines")
    add("--web", action="store_true", help="chat in the browser, on this machine only")
    add("--port", type=int, default=7860, help="port of --web")
    add("--share", action="store_true", help="let --web be reached from the internet")
    add("--engine", choices=["auto", "fast", "generate"], default="auto",
        help="what writes: auto takes the fast one where it gives the same tokens")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--torch_dtype", default="auto", help="auto, float32, bfloat16 or float16",
        choices=["auto", "float32", "bfloat16", "float16"])  # fmt: skip
    add("--quantize", choices=["int8", "int4"], help="weights in 8 or 4 bits (bitsandbytes)")
    add("--force", action="store_true", help="also where base and adapter do not belong together")
    add("--trust_remote_code", action="store_true", help="run code in the base folder")
    return parser


def sampling_options(args: argparse.Namespace) -> dict:
    """Only what was asked for; everything else is the base's own."""
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    if args.greedy:
        return {k: v for k, v in given.items() if k not in NEEDS_SAMPLING} | {"do_sample": False}
    return given | ({"do_sample": True} if given.keys() & NEEDS_SAMPLING else {})


def check_option(name: str, value: float) -> None:
    """Raise a UserError where a sampling option is out of range."""
    if name in ("temperature", "repetition_penalty") and not value > 0:
        hint = "; for the likeliest token always, use --greedy" if name == "temperature" else ""
        raise UserError(f"{name} {value}: must be over 0{hint}")
    if name == "top_p" and not 0 < value <= 1:
        raise UserError(f"top_p {value}: must be over 0 and at most 1")
    if name == "top_k" and value < 0:
        raise UserError(f"top_k {value}: must be 0 or more")


def adapters_of(words: list[str]) -> dict[str, str]:
    """``["poems=path/a", "path/b"]`` → ``{"poems": "path/a", "b": "path/b"}``.

    Raises:
        UserError: two adapters of one name, or one that is called as the base is.
    """
    found: dict[str, str] = {}
    for word in words:
        name, path = name_and_path(word)
        if name in found:
            raise UserError(f"--lora_model {word}: a second adapter {name!r}; write NAME={path}")
        found[name] = path
    return found


def read_sum(words: str, names: list[str]) -> tuple[dict[str, float], str] | None:
    """``"a=0.7 b=0.3 svd"`` → ``({"a": 0.7, "b": 0.3}, "svd")``; None for anything else.

    Args:
        names: the adapters that are loaded: ``a=...`` for one of these is no path.

    Raises:
        UserError: a weight is no number, or an adapter comes twice.
    """
    *terms, last = words.split() or [""]
    kind = "cat" if "=" in last or not terms else last
    terms += [last] if "=" in last else []
    pairs = [(name, value) for name, _, value in (term.rpartition("=") for term in terms)]
    if not pairs or not all("=" in term for term in terms) or not _is_sum(words, pairs, names):
        return None
    weights: dict[str, float] = {}
    for name, value in pairs:
        if name in weights:
            raise UserError(f"{name} comes twice; give each adapter one weight")
        if (number := _number(value)) is None:
            raise UserError(f"{name}={value}: the weight must be a number, as in {name}=0.7")
        weights[name] = number
    return weights, kind


def _is_sum(words: str, pairs: list[tuple[str, str]], names: list[str]) -> bool:
    """Whether ``NAME=VALUE`` words are weights: several of them, or a number for a loaded one."""
    if os.path.exists(words.partition("=")[2]):  # one path, perhaps with spaces
        return False
    if len(pairs) > 1:
        return True
    (name, value), *_ = pairs
    if "/" in name and name not in names:  # a path that is not there, with a `=` in it
        return False
    return _number(value) is not None or (name in names and "/" not in value)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def name_and_path(word: str) -> tuple[str, str]:
    """``name=path`` or a path, which is then called by its folder's name."""
    name, equals, path = word.partition("=")
    if not equals or Path(word).exists() or "/" in name:
        name, path = Path(word).resolve().name, word
    if not name or not path or name == "off" or any(c.isspace() for c in name):
        raise UserError(f"--lora_model {word}: expected NAME=PATH, NAME a word other than 'off'")
    return name, path
