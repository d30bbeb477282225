"""Row shapes: one row → one conversation ``[{"role", "content"}, ...]``.

The shape is told by the names in the row:

    {"messages": [{"role", "content"}, ...]}    OpenAI
    {"conversations": [{"from", "value"}, ...]} sharegpt
    {"question", "answer"}                      question/answer
    {"instruction", "input", "output", ...}     alpaca (history too)
    {"prompt", "completion"}                    prompt/completion, as text or as messages

Every shape may bring a ``system`` prompt.  An assistant turn that is not to be learned
(``"train": false`` or OpenAI's ``"weight": 0``) keeps ``"train": False`` in the conversation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from tinyllm.errors import UserError
from tinyllm.printable import one_line

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
                  "system": "system"}  # fmt: skip
SYSTEM_COLUMNS = ("system", "system_prompt")
LIST_COLUMNS = frozenset({"messages", "conversations", "history", "prompt", "completion"})


class RowError(UserError):
    """A row that cannot be used; the message is the reason, the caller knows file and line."""


@dataclass(frozen=True)
class RowRules:
    """How rows are read.

    Attributes:
        columns: our name of a column → its name in the files, where it is another.
        train_on: ``all`` assistant turns are learned, or only the ``last``.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    train_on: str = "all"


def conversation_of(row: object, rules: RowRules = RowRules()) -> list[dict]:
    """Turn a row of any known shape into a checked conversation.

    Raises:
        RowError: the reason why the row cannot be used.
    """
    if not isinstance(row, dict):
        raise RowError(f"expected an object with named fields, got {type(row).__name__}")
    row = _renamed(row, rules.columns)
    messages = _checked(_shape_of(row, rules.columns)(row))
    if rules.train_on == "last":
        messages = _only_last(messages)
    if not any(m["role"] == "assistant" and m.get("train", True) for m in messages):
        raise RowError("no assistant turn is to be learned")
    return messages


def unused_columns(row: dict, mapped: frozenset[str]) -> frozenset[str]:
    """Names in a row that no shape reads; ``mapped`` are those that ``--columns`` names."""
    return _unknown(tuple(row)) - mapped


@lru_cache
def _unknown(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(names) - KNOWN_COLUMNS


def _renamed(row: dict, columns: Mapping[str, str]) -> dict:
    """The row under our names; a row of another file, with none of the columns, stays as it is."""
    if not columns:
        return row
    found = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    if not found:
        return row
    missing = [theirs for ours, theirs in columns.items()
               if theirs not in row and ours not in OPTIONAL_COLUMNS]  # fmt: skip
    if missing:
        raise RowError(f"no column {one_line(missing[0], 40)!r}, which --columns names")
    return {**{name: value for name, value in row.items() if name not in columns.values()}, **found}


def _shape_of(row: dict, columns: Mapping[str, str]):
    """The reader of the row's shape; names that --columns maps, and filled ones, go first."""
    ours = frozenset(columns)
    filled = tuple(name for name, value in row.items() if value is not None and value != "")
    read = _reader_of(filled, ours) or _reader_of(tuple(row), ours)
    if read is not None:
        return read
    shown = one_line(", ".join(sorted(map(str, row))[:6]), 100) or "nothing"
    raise RowError(
        f"no known shape: the row has {shown}; expected question+answer, messages, conversations, "
        "instruction+output or prompt+completion (--columns maps other names)"
    )


@lru_cache
def _reader_of(present: tuple[str, ...], ours: frozenset[str]):
    """Rows of one file have the same names, so this is worked out once."""
    shapes = [(names, read) for names, read in SHAPES if names <= set(present)]
    return max(shapes, key=lambda shape: bool(shape[0] & ours))[1] if shapes else None


def _from_question_answer(row: dict) -> list[dict]:
    return [*_system(row), _turn("user", row["question"]), _turn("assistant", row["answer"])]


def _from_prompt_completion(row: dict) -> list[dict]:
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return [*_system(row), _turn("user", prompt), _turn("assistant", completion)]
    before = [_message(item) for item in _list_of_objects(row, "prompt")]
    before = [turn | {"train": False} if turn["role"] == "assistant" else turn for turn in before]
    after = [_message(item) for item in _list_of_objects(row, "completion")]
    return _with_system(row, before + after)


def _from_alpaca(row: dict) -> list[dict]:
    history = row.get("history")
    history = [] if history is None or history == "" else history
    if not isinstance(history, list) or any(
        not isinstance(pair, list) or len(pair) != 2 for pair in history
    ):
        raise RowError("history must be a list of [question, answer] pairs")
    turns = [_turn(role, text) for pair in history
             for role, text in zip(("user", "assistant"), pair, strict=True)]  # fmt: skip
    extra = "" if row.get("input") is None else row["input"]
    if not isinstance(row["instruction"], str) or not isinstance(extra, str):
        raise RowError("instruction and input must be text")
    question = "\n".join(part for part in (row["instruction"], extra) if part.strip())
    return [*_system(row), *turns, _turn("user", question), _turn("assistant", row["output"])]


def _from_sharegpt(row: dict) -> list[dict]:
    turns = []
    for item in _list_of_objects(row, "conversations"):
        if item.get("role") is not None:
            turns.append(_message(item))
            continue
        role = SHAREGPT_ROLES.get(str(item.get("from")))
        if role is None:
            speaker = one_line(item.get("from"), 40)
            raise RowError(f"unknown speaker {speaker!r}: expected human, gpt or system")
        turns.append(_turn(role, item.get("value")) | _train_mark(role, item))
    return _with_system(row, turns)


def _from_messages(row: dict) -> list[dict]:
    return _with_system(row, [_message(item) for item in _list_of_objects(row, "messages")])


SHAPES = (
    (frozenset({"messages"}), _from_messages),
    (frozenset({"conversations"}), _from_sharegpt),
    (frozenset({"question", "answer"}), _from_question_answer),
    (frozenset({"instruction", "output"}), _from_alpaca),
    (frozenset({"prompt", "completion"}), _from_prompt_completion),
)
OPTIONAL_COLUMNS = frozenset({"input", "history", *SYSTEM_COLUMNS})
KNOWN_COLUMNS = frozenset().union(*(names for names, _ in SHAPES), OPTIONAL_COLUMNS)


def _system(row: dict) -> list[dict]:
    given = [row[name] for name in SYSTEM_COLUMNS if row.get(name) not in (None, "")]
    if len(given) > 1 and given[0] != given[1]:
        raise RowError("system and system_prompt say different things")
    return [_turn("system", given[0])] if given else []


def _with_system(row: dict, turns: list[dict]) -> list[dict]:
    """Put the row's system prompt first, unless the turns begin with the same one."""
    system = _system(row)
    if not turns or turns[0]["role"] != "system" or not system:
        return [*system, *turns]
    if turns[0]["content"] != system[0]["content"]:
        raise RowError("the row has two system prompts, its own and that of its first turn")
    return turns


def _turn(role: object, content: object) -> dict:
    return {"role": role, "content": content}


def _message(item: dict) -> dict:
    """An OpenAI message; content in parts is joined when every part is text."""
    role, content = item.get("role"), item.get("content")
    if isinstance(content, list) and content:
        texts = [part.get("text") for part in content
                 if isinstance(part, dict) and part.get("type") == "text"]  # fmt: skip
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            raise RowError("a message has parts that are not text")
        content = "".join(texts)
    return _turn(role, content) | _train_mark(role, item)


def _train_mark(role: object, item: dict) -> dict:
    """``{"train": False}`` for an assistant turn that the row takes out of the loss, else nothing."""
    train, weight = item.get("train"), item.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"train is {one_line(repr(train), 40)}, expected true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise RowError(f"weight is {one_line(repr(weight), 40)}, expected 0 or 1")
    if role != "assistant":
        if train:
            raise RowError("only assistant turns can be learned, another one has train: true")
        return {}
    return {"train": False} if train is False or weight == 0 else {}


def _list_of_objects(row: dict, name: str) -> list[dict]:
    items = row[name]
    if not isinstance(items, list) or any(not isinstance(item, dict) for item in items):
        raise RowError(f"{name} must be a list of objects")
    return items


def _only_last(messages: list[dict]) -> list[dict]:
    return [m | {"train": False} if m["role"] == "assistant" else m for m in messages[:-1]] + [
        messages[-1]
    ]


def _checked(messages: list[dict]) -> list[dict]:
    """Check types, order and that there is something to learn; trim white space around each turn."""
    for number, message in enumerate(messages, 1):
        _check_turn(number, message)
    body = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not body:
        raise RowError("the conversation has no turn")
    for number, message in enumerate(body, 1):
        expected = "user" if number % 2 else "assistant"
        if message["role"] != expected:
            raise RowError(f"turn {number} is by {message['role']}, expected {expected}")
    if body[-1]["role"] != "assistant":
        raise RowError("the conversation ends with a user turn: nothing to learn from it")
    return [m | {"content": m["content"].strip()} for m in messages]


def _check_turn(number: int, message: dict) -> None:
    role, content = message["role"], message["content"]
    if role not in ROLES:
        shown = one_line(repr(role), 40)
        raise RowError(f"turn {number} has the unknown role {shown}: expected {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RowError(f"the {role} turn is {type(content).__name__}, expected text")
    if not content.strip():
        raise RowError(f"the {role} turn is empty")
    if "\x00" in content:
        raise RowError(f"the {role} turn contains a NUL character")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"the {role} turn contains half a character (a lone surrogate)") from None
