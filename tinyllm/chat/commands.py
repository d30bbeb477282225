"""Lines that begin with a slash."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tinyllm.chat.options import (
    NEEDS_SAMPLING,
    SAMPLING,
    check_option,
    name_and_path,
    read_sum,
)
from tinyllm.chat.terminal import say
from tinyllm.errors import UserError


class Command(NamedTuple):
    """What a command is called with, what it does, and the function ``(chat, words) → stay``."""

    usage: str
    help: str
    do: Callable


def obey(chat, line: str) -> bool:
    """Do what a line says; False to leave the chat.

    Raises:
        UserError: there is no such command, or it cannot be done.
    """
    name, _, rest = line.partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "/help lists them"
        raise UserError(f"no command {name}; {hint} (// begins a question with a slash)")
    return command.do(chat, rest.strip()) is not False


def _help(chat, rest: str) -> None:
    width = max(len(c.usage) for c in COMMANDS.values())
    say("\n".join(f"{c.usage:{width}}  {c.help}" for c in COMMANDS.values()))
    say("quit, exit or Ctrl-D leaves; Ctrl-C stops a reply; // begins a question with a slash")


def _reset(chat, rest: str) -> None:
    chat.turns.forget()
    say("a new conversation; the system prompt stays")


def _system(chat, rest: str) -> None:
    if rest:
        chat.turns.system = "" if rest == "off" else rest
        chat.turns.forget()
        say("a new conversation under this system prompt" if rest != "off" else "no system prompt")
    else:
        say(f"system prompt: {chat.turns.system or '(none)'}")


def _adapter(chat, rest: str) -> None:
    voices = chat.voices
    if (sum_of := read_sum(rest, voices.names)) is not None:
        rest = voices.combine(*sum_of)
    elif "=" in rest:
        name, path = name_and_path(rest)
        voices.add(name, path)
        rest = name
    if rest:
        voices.choose(None if rest == "off" else rest)
    known = [*voices.names] if voices.merged else [*voices.names, "off"]
    say(f"answering: {voices.current or 'the base alone'}; there is {', '.join(known)}")


def _unload(chat, rest: str) -> None:
    if not rest:
        raise UserError("/unload needs an adapter's name")
    voices = chat.voices
    voices.unload(rest)
    say(f"unloaded: {rest}; there is {', '.join([*voices.names, 'off'])}")


def _compare(chat, rest: str) -> None:
    chat.voices.engine(None)  # there must be a base to compare with
    if not chat.voices.names:
        raise UserError(
            "there is no adapter to compare the base with; /adapter NAME=PATH loads one"
        )
    if rest:
        before, chat.compare = chat.compare, True
        try:
            chat.ask(rest)
        finally:
            chat.compare = before
    else:
        chat.compare = not chat.compare
        say(f"comparing with the base: {'on' if chat.compare else 'off'}")


def _retry(chat, rest: str) -> None:
    before = chat.turns.turns.copy()
    question = chat.turns.take_back()
    if question is None:
        raise UserError("nothing has been asked yet")
    answered = False
    try:
        answered = bool(chat.ask(question).text)
    finally:
        if not answered:
            chat.turns.turns = before


def _undo(chat, rest: str) -> None:
    question = chat.turns.take_back()
    if question is None:
        raise UserError("nothing has been asked yet")
    say(f"taken back: {question if len(question) <= 60 else question[:59] + '…'}")


def _params(chat, rest: str) -> None:
    changes = dict(_change(word) for word in rest.split())
    speaker = chat.speaker
    if changes.pop("greedy", None):
        kept = {k: v for k, v in speaker.sampling.items() if k not in NEEDS_SAMPLING}
        speaker.sampling = kept | {"do_sample": False}
    for name, value in changes.items():
        if name == "seed":
            import torch

            torch.manual_seed(value)
        elif name in SAMPLING:
            sampled = {"do_sample": True} if name in NEEDS_SAMPLING else {}
            speaker.sampling = speaker.sampling | {name: value} | sampled
        else:
            setattr(speaker, name, value)
    say(_describe(chat))


def _change(word: str) -> tuple[str, float]:
    """``temperature=0.7`` → ``("temperature", 0.7)``."""
    name, equals, value = word.partition("=")
    if word == "greedy":
        return "greedy", 1
    whole = name in ("top_k", "max_new_tokens", "max_length", "seed")
    if (not whole and name not in SAMPLING) or not equals:
        raise UserError(
            f"/params {word}: expected greedy or NAME=VALUE, NAME one of {', '.join(SAMPLING)}, "
            "max_length, max_new_tokens, seed"
        )
    try:
        number = int(value) if whole else float(value)
    except ValueError:
        raise UserError(f"/params {word}: {value!r} is no number of the kind it needs") from None
    if name.startswith("max_") and number < 1:
        raise UserError(f"{name} {number}: must be 1 or more")
    check_option(name, number)
    return name, number


def _describe(chat) -> str:
    speaker = chat.speaker
    config = speaker.config(1)
    engine = speaker.engine(chat.voices.current, config)
    if config.do_sample:
        how = f"temperature {config.temperature or 1.0}, top_p {config.top_p or 1.0}, "
        how += f"top_k {50 if config.top_k is None else config.top_k}"
    else:
        how = "greedy (always the likeliest token)"
    return (
        f"sampling        {how}, repetition_penalty {config.repetition_penalty or 1.0}\n"
        f"longest         prompt {speaker.max_length}, reply {speaker.max_new_tokens}, "
        f"both {speaker.context} tokens\n"
        f"answering       {chat.voices.current or 'the base alone'}\n"
        f"engine          {engine.name}{f' ({engine.why})' if engine.why else ''}\n"
        f"last reply      {chat.last.stats() if chat.last else 'none yet'}"
    )


def _stats(chat, rest: str) -> None:
    chat.show_stats = not chat.show_stats
    say(f"numbers after each reply: {'on' if chat.show_stats else 'off'}")


def _save(chat, rest: str) -> None:
    if not rest:
        raise UserError("/save needs a file name")
    chat.turns.save(Path(rest).expanduser())
    say(f"saved {len(chat.turns.turns) // 2} question(s) to {rest}, as a row to train on")


def _load(chat, rest: str) -> None:
    if not rest:
        raise UserError("/load needs a file name")
    chat.turns.load(Path(rest).expanduser())
    say(f"going on with {len(chat.turns.turns) // 2} question(s) from {rest}")


def _quit(chat, rest: str) -> bool:
    return False


COMMANDS = {
    c.usage.split()[0]: c
    for c in (
        Command("/help", "this list", _help),
        Command("/reset", "forget the conversation", _reset),
        Command("/system [TEXT|off]", "show or change the system prompt", _system),
        Command(
            "/adapter [NAME|off]",
            "who answers; NAME=PATH loads one more, A=0.7 B=0.3 is a weighted sum",
            _adapter,
        ),
        Command("/unload NAME", "take an adapter out of memory", _unload),
        Command(
            "/compare [QUESTION]", "the base's reply beside the adapter's, once or always", _compare
        ),
        Command("/retry", "answer the last question again", _retry),
        Command("/undo", "take back the last question", _undo),
        Command("/params [NAME=VALUE ...]", "show or change how replies are written", _params),
        Command("/stats", "numbers after each reply, on or off", _stats),
        Command("/save FILE", "write the conversation as a row to train on", _save),
        Command("/load FILE", "go on with a saved conversation", _load),
        Command("/quit", "leave", _quit),
    )
}
