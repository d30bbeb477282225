"""What stands between the chat and a terminal or pipe: lines in, text and remarks out."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tinyllm.errors import EXIT_INTERRUPTED

CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
USER_PROMPT, ASSISTANT_PROMPT = "用户: ", "助手: "


def prepare() -> None:
    """Line editing with a history where there is a terminal; output that no character can break."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            import readline  # input() uses it from now on, and it knows how wide characters are
        except ImportError:  # a Python built without it: plain lines
            return
        readline.parse_and_bind("set enable-bracketed-paste on")


@contextmanager
def ctrl_c_leaves() -> Iterator[None]:
    """While libraries and models load, Ctrl-C ends the program at once.

    As an exception it would surface somewhere inside an import, with that library's own words.
    """

    def leave(number, frame) -> None:
        os.write(2, b"\ninterrupted\n")
        os._exit(EXIT_INTERRUPTED)

    try:
        before = signal.signal(signal.SIGINT, leave)
    except ValueError:  # not in the main thread: its signals are not ours to handle
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class LineDropped(KeyboardInterrupt):
    """Ctrl-C with something on the line."""


def read_question(prompt: str = USER_PROMPT) -> str | None:
    """The next line of the input; None at its end, or on Ctrl-C with nothing typed."""
    try:
        question = _read_line(prompt)
        question.encode("utf-8")  # bytes that are no UTF-8 arrive as lone surrogates
    except LineDropped:
        print()
        return ""
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    except UnicodeError:
        note("that was not UTF-8 text; please type it again")
        return ""
    return without_controls(question)


def _read_line(prompt: str) -> str:
    """``input``; in a terminal Ctrl-C tells whether something was typed, which is gone afterwards."""
    readline = sys.modules.get("readline")
    if readline is None or not sys.stdin.isatty():
        return input(prompt)

    def interrupt(number, frame) -> None:
        raise LineDropped if readline.get_line_buffer() else KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        return input(prompt)
    finally:
        signal.signal(signal.SIGINT, before)


def without_controls(text: str) -> str:
    """Text without characters that mean nothing to a model (Ctrl keys, colour codes); said aloud."""
    kept = text.translate(CONTROLS)
    if len(kept) < len(text):
        note(f"left out {len(text) - len(kept)} control character(s)")
    return kept


def say(text: str, end: str = "\n") -> None:
    """Print at once."""
    print(text, end=end, flush=True)


def say_piece(text: str) -> None:
    """Print a piece of a reply; what would act on the terminal is left out."""
    say(text.translate(CONTROLS), end="")


def note(text: str) -> None:
    """A remark about the chat itself, kept apart from what the model says."""
    print(f"({text})", file=sys.stderr, flush=True)
