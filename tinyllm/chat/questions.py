"""A file of questions → a file of answers, many at once; a stopped run goes on where it was.

Each answer is one line, written whole as soon as it is known: the question's own row with ``answer``,
``stopped``, ``num_tokens``, and ``line`` and ``made_with`` to go on by.  When all are there the file is
put in the order of the questions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinyllm.chat.speaker import Speaker
from tinyllm.chat.terminal import note
from tinyllm.errors import UserError
from tinyllm.generate import as_reply

QUESTION_KEYS = ("question", "prompt")
OURS = ("answer", "error", "stopped", "num_tokens", "line", "made_with")


@dataclass(frozen=True)
class Question:
    """One row: its line number from 1, the row itself, and the conversation to answer."""

    line: int
    row: dict
    messages: list[dict]


def answer_file(
    speaker: Speaker, questions_path: Path, answers_path: Path, system: str, seed: int | None,
    made_with: str, counted: Callable,
) -> None:  # fmt: skip
    """Answer every question of a file that has no answer yet.

    Args:
        seed: makes each question's sampling reproducible by itself; None to leave it to chance.
        made_with: says which model and settings answer; answers of others are not mixed in.
        counted: gives, for what and how many, a context with a function that counts.

    Raises:
        UserError: a row that is no question, or answers that belong to something else.
    """
    questions = read_questions(questions_path, system)
    done = read_answers(answers_path, questions, made_with)
    left = [q for q in questions if q.line not in done]
    if done:
        note(f"{answers_path}: {len(done)} of {len(questions)} answers are there, going on")
    with (
        answers_path.open("a", encoding="utf-8") as out,
        counted("answers", len(left), True) as count,
    ):

        def write(question: Question, **result) -> None:
            row = {k: v for k, v in question.row.items() if k not in OURS}
            row |= result | {"line": question.line, "made_with": made_with}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
            done[question.line] = row
            count(1)

        _answer(speaker, left, seed, write)
    put_in_order(answers_path, done)
    refused = sum("error" in row for row in done.values())
    note(
        f"{len(done) - refused} answers in {answers_path}"
        + (f"; {refused} question(s) were too long, see 'error' there" if refused else "")
    )


def _answer(speaker: Speaker, questions: list[Question], seed: int | None, write: Callable) -> None:
    """Answer questions side by side, those without room for a full reply one by one."""
    tokenizer, asked, prompts, narrow = speaker.voices.tokenizer, [], [], []
    for question in questions:
        try:
            messages, dropped = speaker.fit(question.messages)
        except UserError as error:
            write(question, answer=None, error=str(error))
            continue
        prompt = speaker.chat_format.encode_prompt(messages)
        extra = {"num_forgotten": dropped} if dropped else {}
        group = asked if len(prompt) + speaker.max_new_tokens <= speaker.context else narrow
        group.append((question, prompt, extra))
    for group in ([asked] if asked else []) + [[one] for one in narrow]:
        prompts = [prompt for _, prompt, _ in group]
        config = speaker.config(max(map(len, prompts)))
        seeds = (
            [seed + q.line for q, _, _ in group] if seed is not None and config.do_sample else None
        )

        def on_done(index: int, ids: list[int], group=group, config=config) -> None:
            question, _, extra = group[index]
            reply = as_reply(tokenizer, ids, config.eos_token_id)
            write(
                question,
                answer=reply.text,
                stopped=reply.stopped,
                num_tokens=reply.num_tokens,
                **extra,
            )

        engine = speaker.engine(speaker.voices.current, config)
        engine.write_many(prompts, config, on_done, seeds)


def read_questions(path: Path, system: str) -> list[Question]:
    """Read the questions: rows with ``question``, ``prompt`` or ``messages``.

    Raises:
        UserError: the file cannot be read, or a row holds no question; file and line are named.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input {path}: {getattr(error, 'strerror', None) or error}") from error
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"--input {path}, line {number}: no JSON: {error}") from error
        messages = _messages(row, system)
        if messages is None:
            raise UserError(
                f"--input {path}, line {number}: expected an object with question, prompt, or "
                "messages that end with a user turn"
            )
        questions.append(Question(number, row, messages))
    if not questions:
        raise UserError(f"--input {path}: there is no question in it")
    return questions


def _messages(row: object, system: str) -> list[dict] | None:
    if not isinstance(row, dict):
        return None
    messages = row.get("messages")
    if messages is None:
        text = next((row[k] for k in QUESTION_KEYS if isinstance(row.get(k), str)), "")
        messages = [{"role": "user", "content": text}] if text.strip() else None
        system = row["system"] if isinstance(row.get("system"), str) else system
    if not isinstance(messages, list) or not all(map(_is_message, messages)) or not messages:
        return None
    body = [m["role"] for m in messages if m["role"] != "system"]
    if body[-1:] != ["user"]:
        return None
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("system", "user", "assistant")
        and isinstance(message.get("content"), str)
    )


def read_answers(path: Path, questions: list[Question], made_with: str) -> dict[int, dict]:
    """The answers that are there, by line; a last line cut short is taken off the file.

    Raises:
        UserError: the file holds something else, or answers to other questions or by another model.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        note(f"{path}: its last line was cut short and is answered again")
        os.truncate(path, len(whole))
    asked, done = {q.line: q for q in questions}, {}
    for number, line in enumerate(whole.decode("utf-8", "replace").splitlines(), 1):
        try:
            row = json.loads(line)
            question = asked[row["line"]]
            same = all(row.get(k) == v for k, v in question.row.items() if k not in OURS)
            made = row["made_with"]
        except (ValueError, KeyError, TypeError):
            same, made = False, made_with
        if not same:
            raise UserError(
                f"--output {path}, line {number}: no answer to a question of this --input; "
                "choose another file"
            )
        if made != made_with:
            raise UserError(
                f"--output {path}, line {number}: made with another model or other settings; "
                "choose another file"
            )
        done[row["line"]] = row
    return done


def put_in_order(path: Path, done: dict[int, dict]) -> None:
    """Rewrite the answers in the order of the questions, whole or not at all."""
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("w", encoding="utf-8") as out:
        for line in sorted(done):
            out.write(json.dumps(done[line], ensure_ascii=False) + "\n")
        out.flush()
        os.fsync(out.fileno())
    scratch.replace(path)


def signature(**settings: object) -> str:
    """Eight characters that change with any of the settings."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
