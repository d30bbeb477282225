"""Text from files made fit to print: what a file says may hold anything at all."""

from __future__ import annotations


def printable(text: object, limit: int = 0) -> str:
    r"""Spell out characters that would act on a terminal or cannot be written as UTF-8.

    Newlines and tabs stay.  ``printable("a\x1b[2J")`` is ``a\x1b[2J`` in visible characters.

    Args:
        text: anything; taken as ``str(text)``.
        limit: most characters, the rest becomes ``…``; 0 for no limit.
    """
    text = str(text)
    if limit and len(text) > limit:
        text = text[: limit - 1] + "…"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _spelled(c) for c in text)


def one_line(text: object, limit: int = 0) -> str:
    """The same, with all white space in a row as one space."""
    return printable(" ".join(str(text).split()), limit)


def _spelled(character: str) -> str:
    # an ideographic space is not "printable" to Python, but it is what Chinese text is written with
    if character.isspace() and ord(character) > 0x7F and character not in "\x85\u2028\u2029":
        return character
    return character.encode("unicode_escape").decode("ascii")
