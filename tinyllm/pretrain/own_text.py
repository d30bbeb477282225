"""From our own text to documents: prose, and conversations in the chat format.

`*.txt` of a folder, documents separated by a blank line.  Two kinds of files are conversations only, which the base
reads in the chat format and not as they stand: `patterns_*.txt` (see patterns.py), and `turns_*.txt`, lines of `问：` and
`答：` in turn.
"""

import hashlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from tinyllm.chat_format import render_family
from tinyllm.errors import UserError
from tinyllm.pretrain.extract import Document, clean_line, document
from tinyllm.pretrain.patterns import read_patterns, read_text

PATTERNS = "patterns_*.txt"
TURNS = "turns_*.txt"
END = "<|endoftext|>"  # the tokenizer's end token, see vocabulary.py


def text_files(folder: Path) -> list[Path]:
    """The `*.txt` of a folder of our own text.

    Raises:
        UserError: there are none.
    """
    if found := sorted(folder.glob("*.txt")):
        return found
    raise UserError(f"--own_text {folder}: no such folder, or no *.txt in it")


def own_documents(folder: Path) -> list[Document]:
    """The prose of a folder: what blank lines separate in its `*.txt`, but for those that are conversations only.

    Raises:
        UserError: there is no `*.txt`, or one is not in UTF-8.

    >>> # "甲\\n乙\\n\\n丙\\n" in stories.txt gives "甲\\n乙" and "丙"
    """
    files = [p for p in text_files(folder) if not (p.match(PATTERNS) or p.match(TURNS))]
    # The id follows the text, so added documents never move others between splits.
    return [
        document("own", f"{path.stem}/{text_id(text)}", text)
        for path in files
        for _, text in blocks(path)
    ]


def blocks(path: Path) -> Iterator[tuple[int, str]]:
    """What blank lines separate in a file, each with the number of its first line, from 1."""
    lines = enumerate(read_text(path).replace("\r", "").split("\n"), 1)
    for filled, group in groupby(lines, key=lambda line: bool(line[1].strip())):
        if filled:
            numbers, texts = zip(*group, strict=True)
            yield numbers[0], "\n".join(texts).strip()


def pattern_documents(folder: Path) -> list[Document]:
    """A conversation in the chat format for each pair that our patterns give; every second one opens with a
    system turn.
    """
    documents: list[Document] = []
    for path in sorted(folder.glob(PATTERNS)):
        for number, pattern in enumerate(read_patterns(path)):
            for place, pair in enumerate(pattern.pairs()):
                text = render_chat([pair], len(documents) % 2 == 1)
                documents.append(document("patterns", f"{path.stem}/{number}/{place}", text))
    return documents


def turn_documents(folder: Path) -> list[Document]:
    """The conversations of `turns_*.txt` in the chat format; about every second one opens with a system turn, the same
    ones each time.

    Raises:
        UserError: one is not lines of `问：` and `答：` in turn, or a file is not in UTF-8.
    """
    documents: list[Document] = []
    for path in sorted(folder.glob(TURNS)):
        for number, block in blocks(path):
            text = "\n".join(clean_line(line) for line in block.split("\n"))
            pairs = question_answer_pairs(text)
            if not pairs or not all(question and answer for question, answer in pairs):
                raise UserError(
                    f"{path}, line {number}: expected lines of 问： and 答： in turn, and a blank line behind "
                    f"them; got {block[:40]!r}"
                )
            identity = text_id(text)
            rendered = render_chat(pairs, int(identity, 16) % 2 == 1)
            documents.append(document("turns", f"{path.stem}/{identity}", rendered))
    return documents


def text_id(text: str) -> str:
    """A short stable name for a stripped text without one."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


SYSTEM_PROMPT = (
    "你是一个友好的助手。"  # says nothing of whose assistant it is: that is for adapters
)


def chat_documents(documents: list[Document]) -> list[Document]:
    """Our question-and-answer text again, in the chat format, so that the base knows its markers.

    A document of `问：` and `答：` lines becomes one conversation, and each of its pairs that can
    stand alone a conversation of its own; every second one opens with a system turn.
    """
    chats: list[Document] = []
    for doc in documents:
        pairs = question_answer_pairs(doc["text"])
        alone = [[pair] for pair in pairs if not pair[0].startswith(("那", "还", "它", "他", "她"))]
        for number, conversation in enumerate([pairs, *alone] if pairs else []):
            identity = f"{doc['id']}/{number}"
            chats.append(document("chat", identity, render_chat(conversation, len(chats) % 2 == 1)))
    return chats


def question_answer_pairs(text: str) -> list[tuple[str, str]]:
    """The pairs of a document that is nothing but alternating `问：` and `答：` lines, else none."""
    lines = text.splitlines()
    if len(lines) % 2 or any(
        not line.startswith("问：" if number % 2 == 0 else "答：")
        for number, line in enumerate(lines)
    ):
        return []
    plain = [line[2:].strip() for line in lines]
    return list(zip(plain[::2], plain[1::2], strict=True))


def render_chat(pairs: list[tuple[str, str]], with_system: bool) -> str:
    """A conversation as the chat format writes it, without the end token that closes it."""
    messages = [{"role": "system", "content": SYSTEM_PROMPT}] if with_system else []
    for question, answer in pairs:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return render_family(messages, END).removesuffix(END)
