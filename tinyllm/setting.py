"""How a setting is declared: a dataclass field with a default and a help text."""

from __future__ import annotations

from dataclasses import field


def setting(default, text: str):
    """A dataclass field with a help text; lists become default factories."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})
