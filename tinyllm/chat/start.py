"""From the command line to whoever does the work: the chat, one answer, a file, the browser."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from threading import Thread

from tinyllm.chat.options import adapters_of, sampling_options
from tinyllm.errors import UserError


class KernelInBackground:
    """Compiles the decoding kernel, the first time, while the libraries are being imported."""

    def __init__(self, wanted: bool) -> None:
        self.library = None
        self.thread = Thread(target=self._load, daemon=True) if wanted else None
        if self.thread:
            self.thread.start()

    def _load(self) -> None:
        from tinyllm.decode import kernel

        self.library = kernel.load()

    def result(self):
        """The loaded library; None where there is none."""
        if self.thread:
            self.thread.join()
        return self.library


def build(args: argparse.Namespace):
    """Load everything.

    Returns:
        A :class:`tinyllm.chat.speaker.Speaker`.

    Raises:
        UserError: a folder is missing or damaged, or base and adapter do not belong together.
    """
    kernel = KernelInBackground(args.engine != "generate")
    from tinyllm.chat.speaker import Speaker
    from tinyllm.chat.voices import load_voices
    from tinyllm.chat_format import chat_format_of

    voices = load_voices(args, kernel.result)
    if args.seed is not None:
        import torch

        torch.manual_seed(args.seed)
    chat_format = chat_format_of(voices.tokenizer)
    return Speaker(
        voices, chat_format, args.max_length, args.max_new_tokens, sampling_options(args)
    )


def run_chat(args: argparse.Namespace, speaker) -> None:
    """Talk in the terminal or through a pipe."""
    from tinyllm.chat.session import Chat

    Chat(speaker, turns(args), args.compare, args.stats, args.json).run()


def run_prompt(args: argparse.Namespace, speaker) -> None:
    """Answer ``--prompt`` on stdout: the reply alone, or with ``--json`` one object.

    Raises:
        UserError: the question is empty or too long.
        KeyboardInterrupt: Ctrl-C, after what was written so far.
    """
    from tinyllm.chat.session import as_json
    from tinyllm.chat.terminal import note, say, say_piece, without_controls

    question = without_controls(args.prompt).strip()
    if not question:
        raise UserError("--prompt is empty")
    messages, _ = speaker.fit(turns(args).messages(question))
    names = [None, speaker.voices.current] if args.compare else [speaker.voices.current]
    for name in names:
        label = f"{name or 'base'}: " if args.compare and not args.json else ""
        if not args.json:
            say(label, end="")
        show = (lambda text: None) if args.json else say_piece
        spoken = speaker.speak(messages, show, name)
        say(json.dumps(as_json(spoken, question, name), ensure_ascii=False) if args.json else "")
        if args.stats:
            note(spoken.stats())
        if spoken.interrupted:
            raise KeyboardInterrupt


def run_file(args: argparse.Namespace, speaker) -> None:
    """Answer ``--input`` into ``--output``."""
    from tinyllm.chat.questions import answer_file, signature
    from tinyllm.progress_bar import counted

    system = turns(args).system
    made_with = signature(
        base=speaker.voices.base, adapter=adapter_content(args), system=system,
        quantize=args.quantize, torch_dtype=args.torch_dtype,
        sampling=speaker.sampling, seed=args.seed, max_length=args.max_length,
        max_new_tokens=args.max_new_tokens,
    )  # fmt: skip
    answer_file(speaker, Path(args.input), Path(args.output), system, args.seed, made_with, counted)


def adapter_content(args: argparse.Namespace) -> str | None:
    """A hash of the weights that answer, so that a later training is not taken for this one."""
    from tinyllm.adapter import read_adapter
    from tinyllm.file_hash import hash_file

    for path in adapters_of(args.lora_model).values():
        adapter = read_adapter(path)
        return hash_file(adapter.path / adapter.weights_file)
    return None


def check_web() -> None:
    """Raise a UserError at once where ``--web`` lacks its libraries."""
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise UserError("--web needs Gradio: pip install -r requirement-web.txt")


def run_web(args: argparse.Namespace, speaker) -> None:
    """Serve the chat as a web page until Ctrl-C."""
    from tinyllm.web import serve

    serve(speaker, turns(args).system, args.port, args.share)


def turns(args: argparse.Namespace):
    """An empty conversation under the system prompt asked for."""
    from tinyllm.chat.turns import Turns
    from tinyllm.chat_format import DEFAULT_SYSTEM_PROMPT

    return Turns(DEFAULT_SYSTEM_PROMPT if args.system_prompt is None else args.system_prompt)
