"""Patterns of short conversations → conversations: the same situation with other people, animals, numbers.

What a small model lacks is to answer what was said, not something near it.  A pattern trains that: its answers
repeat, or follow from, the very thing that fills its question.  In ``patterns_*.txt`` blank lines
separate them:

    {动物 叫声} 小羊 咩咩 | 小鸭 嘎嘎       slots, some that belong together, and what fills them
    问：{动物}是怎么叫的？                  questions, one or more
    答：{动物}的叫声是“{叫声}”。            answers, each of which fits each question
"""

import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

from tinyllm.errors import UserError

MOST = 64  # conversations of a pattern; those of most are far more, and alike
SLOT_LINE = re.compile(r"\{([^{}]+)\} (.+)")
SLOT = re.compile(r"\{([^{}]*)\}")
# The special tokens of vocabulary.py, which cannot be imported here: it reads the corpus, and that reads this.
MARKER = re.compile(r"<\|(system|user|assistant|endoftext|pad|reserved_\d+)\|>")


@dataclass
class Pattern:
    """A question-and-answer pattern.

    Attributes:
        slots: of each line of slots the fillings, names to words; lines combine freely.
    """

    slots: list[list[dict[str, str]]]
    questions: list[str]
    answers: list[str]

    def pairs(self, most: int = MOST) -> list[tuple[str, str]]:
        """Questions with answers, ``most`` at most, chosen by chance, the same for the same pattern."""
        choices = [*self.slots, self.questions, self.answers]
        total = math.prod(map(len, choices))
        chosen = random.Random(repr(self)).sample(range(total), min(most, total))
        # where a question has not all slots it comes several times
        return list(dict.fromkeys(self._pair(number, choices) for number in chosen))

    def _pair(self, number: int, choices: list[list]) -> tuple[str, str]:
        """One of all combinations, by its number."""
        found = []
        for options in choices:
            number, place = divmod(number, len(options))
            found.append(options[place])
        *fillings, question, answer = found
        words = {name: word for filling in fillings for name, word in filling.items()}
        return _filled(question, words), _filled(answer, words)


def _filled(text: str, words: dict[str, str]) -> str:
    return SLOT.sub(lambda match: words[match[1]], text)


def read_text(path: Path) -> str:
    """A text file of ours.

    Raises:
        UserError: it is not in UTF-8, or holds a marker of the chat format, which would be read as one.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors of Windows put a mark there
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    if found := MARKER.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise UserError(
            f"{path}, line {line}: {found[0]} is a marker of the chat format; write it otherwise, or take it out"
        )
    return text


def read_patterns(path: Path) -> list[Pattern]:
    """The patterns of a file.

    Raises:
        UserError: a line that is neither slots nor question nor answer, or slots that do not fit; with file
            and line.
    """
    found: list[Pattern] = []
    pattern = Pattern([], [], [])
    lines = read_text(path).splitlines()
    for number, line in enumerate([*lines, ""], 1):
        try:
            if line.strip():
                _add(pattern, line.strip())
            elif pattern.slots or pattern.questions or pattern.answers:
                _check(pattern)
                found.append(pattern)
                pattern = Pattern([], [], [])
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    return found


def _add(pattern: Pattern, line: str) -> None:
    if line.startswith("问："):
        pattern.questions.append(line.removeprefix("问："))
    elif line.startswith("答："):
        pattern.answers.append(line.removeprefix("答："))
    elif match := SLOT_LINE.fullmatch(line):
        pattern.slots.append(_fillings(match[1].split(), match[2]))
    else:
        raise ValueError(f"expected a line of slots, 问： or 答：, got {line!r}")


def _fillings(names: list[str], text: str) -> list[dict[str, str]]:
    """``猫 喵 | 狗 汪`` for the names 动物 and 叫声: two fillings."""
    fillings = [part.split() if len(names) > 1 else [part.strip()] for part in text.split("|")]
    for words in fillings:
        if len(words) != len(names) or not all(words):
            raise ValueError(f"{len(names)} words expected for {names}, got {words}")
    return [dict(zip(names, words, strict=True)) for words in fillings]


def _check(pattern: Pattern) -> None:
    """Of a whole pattern, at the line behind it."""
    if not pattern.questions or not pattern.answers:
        raise ValueError("the pattern before has no 问： or no 答：")
    names = [name for line in pattern.slots for name in line[0]]
    if len(names) > len(set(names)):
        raise ValueError(f"the pattern before has a slot twice: {names}")
    used = {name for text in pattern.questions + pattern.answers for name in SLOT.findall(text)}
    if unknown := used - set(names):
        raise ValueError(f"the pattern before uses slots that it does not have: {sorted(unknown)}")
