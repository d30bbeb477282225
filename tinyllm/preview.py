"""Decoded examples with what is learned marked, to look at before training."""

from __future__ import annotations

import itertools
import os
import sys

import numpy as np

from tinyllm.chat_format import IGNORE_INDEX
from tinyllm.examples import Examples
from tinyllm.printable import printable

# On a terminal in green; in a file or a pipe between brackets that data hardly uses.
COLOUR = ("\x1b[32m", "\x1b[0m")
BRACKETS = ("【", "】")


def preview(examples: Examples, tokenizer, number: int, marks: tuple[str, str]) -> str:
    """Show examples from all over the training data, as text.

    Args:
        number: how many; all of them if there are fewer.
        marks: what to write before and after each learned part.
    """
    number = min(number, len(examples))
    shown = []
    for place in range(number):
        index = place * len(examples) // number
        example = examples[index]
        num_learned = int((example["labels"] != IGNORE_INDEX).sum())
        shown.append(
            f"--- example {index + 1:,} of {len(examples):,}: {len(example['input_ids'])} tokens, "
            f"{num_learned} of them learned\n{marked(example, tokenizer, marks)}\n"
        )
    return "\n".join(shown)


def marked(example: dict[str, np.ndarray], tokenizer, marks: tuple[str, str]) -> str:
    """One example as text, ``question【answer<end>】``.

    Args:
        example: ``input_ids`` and ``labels``, each ``(T,)``.
    """
    ids, learned = example["input_ids"].tolist(), example["labels"] != IGNORE_INDEX
    borders = [0, *(np.flatnonzero(learned[1:] != learned[:-1]) + 1).tolist(), len(ids)]
    text, shown = "", []
    for start, end in itertools.pairwise(borders):
        # by growing prefixes: some tokenizers decode a stretch alone without its leading space
        through = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        stretch, text = printable(through[len(text) :]), through
        shown.append(f"{marks[0]}{stretch}{marks[1]}" if learned[start] else stretch)
    return "".join(shown)


def marks_for(stream=sys.stdout) -> tuple[str, str]:
    """Colour where it can be seen and is wanted (https://no-color.org), brackets elsewhere."""
    return COLOUR if stream.isatty() and not os.environ.get("NO_COLOR") else BRACKETS
