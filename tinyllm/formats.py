"""Row shapes: one JSON object → one conversation ``[{"role", "content"}, ...]``.

The shape is told by the names in the row:

    {"question", "answer"}                      question/answer
    {"instruction", "input", "output", ...}     alpaca (system, history too)
    {"conversations": [{"from", "value"}, ...]} sharegpt
    {"messages": [{"role", "content"}, ...]}    OpenAI
    {"prompt", "completion"}                    prompt/completion
"""

from __future__ import annotations

from tinyllm.errors import UserError

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
                  "system": "system"}  # fmt: skip


class RowError(UserError):
    """A row that cannot be used; the message is the reason, the caller knows file and line."""


def conversation_of(row: object) -> list[dict]:
    """Turn a row of any known shape into a checked conversation.

    Raises:
        RowError: the reason why the row cannot be used.
    """
    if not isinstance(row, dict):
        raise RowError(f"expected an object with named fields, got {type(row).__name__}")
    for names, read in SHAPES:
        if names <= row.keys():
            return _checked(read(row))
    shown = ", ".join(sorted(map(str, row))[:6]) or "nothing"
    raise RowError(
        f"no known shape: the row has {shown}; expected question+answer, messages, conversations, "
        "instruction+output or prompt+completion"
    )


def _from_question_answer(row: dict) -> list[dict]:
    return [*_system(row), _turn("user", row["question"]), _turn("assistant", row["answer"])]


def _from_prompt_completion(row: dict) -> list[dict]:
    return [*_system(row), _turn("user", row["prompt"]), _turn("assistant", row["completion"])]


def _from_alpaca(row: dict) -> list[dict]:
    history = row.get("history") or []
    if not isinstance(history, list) or any(
        not isinstance(pair, list) or len(pair) != 2 for pair in history
    ):
        raise RowError("history must be a list of [question, answer] pairs")
    turns = [_turn(role, text) for pair in history
             for role, text in zip(("user", "assistant"), pair, strict=True)]  # fmt: skip
    instruction, extra = row["instruction"], row.get("input") or ""
    if not isinstance(instruction, str) or not isinstance(extra, str):
        raise RowError("instruction and input must be text")
    question = "\n".join(part for part in (instruction, extra) if part.strip())
    return [*_system(row), *turns, _turn("user", question), _turn("assistant", row["output"])]


def _from_sharegpt(row: dict) -> list[dict]:
    turns = []
    for item in _list_of_objects(row, "conversations"):
        if "role" in item:
            turns.append(_turn(item["role"], item.get("content")))
            continue
        role = SHAREGPT_ROLES.get(str(item.get("from")))
        if role is None:
            raise RowError(f"unknown speaker {item.get('from')!r}: expected human, gpt or system")
        turns.append(_turn(role, item.get("value")))
    return turns if turns and turns[0]["role"] == "system" else [*_system(row), *turns]


def _from_messages(row: dict) -> list[dict]:
    turns = [
        _turn(item.get("role"), item.get("content")) for item in _list_of_objects(row, "messages")
    ]
    return turns if turns and turns[0]["role"] == "system" else [*_system(row), *turns]


SHAPES = (
    (frozenset({"messages"}), _from_messages),
    (frozenset({"conversations"}), _from_sharegpt),
    (frozenset({"question", "answer"}), _from_question_answer),
    (frozenset({"instruction", "output"}), _from_alpaca),
    (frozenset({"prompt", "completion"}), _from_prompt_completion),
)


def _system(row: dict) -> list[dict]:
    system = row.get("system") or row.get("system_prompt")
    return [_turn("system", system)] if system else []


def _turn(role: object, content: object) -> dict:
    return {"role": role, "content": content}


def _list_of_objects(row: dict, name: str) -> list[dict]:
    items = row[name]
    if not isinstance(items, list) or any(not isinstance(item, dict) for item in items):
        raise RowError(f"{name} must be a list of objects")
    return items


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
    return [{"role": m["role"], "content": m["content"].strip()} for m in messages]


def _check_turn(number: int, message: dict) -> None:
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise RowError(f"turn {number} has the unknown role {role!r}: expected {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RowError(f"the {role} turn is {type(content).__name__}, expected text")
    if not content.strip():
        raise RowError(f"the {role} turn is empty")
    if "\x00" in content:
        raise RowError(f"the {role} turn contains a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise RowError(f"the {role} turn contains half a character (a lone surrogate)")
