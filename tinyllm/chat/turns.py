"""A conversation so far: ask, take back, save and load."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from tinyllm.errors import UserError


@dataclass
class Turns:
    """User and assistant turns in turn, under a system prompt ('' for none)."""

    system: str
    turns: list[dict] = field(default_factory=list)

    def messages(self, question: str | None = None) -> list[dict]:
        """The whole conversation, with one more question where there is one."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = [] if question is None else [{"role": "user", "content": question}]
        return [*system, *self.turns, *asked]

    def remember(self, question: str, answer: str) -> None:
        self.turns += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]

    def take_back(self) -> str | None:
        """Forget the last question and its answer; returns the question."""
        if not self.turns:
            return None
        question = self.turns[-2]["content"]
        del self.turns[-2:]
        return question

    def forget(self) -> None:
        self.turns.clear()

    def save(self, path: Path) -> None:
        """Write the conversation as one row of training data; never over an existing file.

        Raises:
            UserError: there is nothing to save, or the file cannot be written.
        """
        if not self.turns:
            raise UserError("nothing to save yet")
        line = json.dumps({"messages": self.messages()}, ensure_ascii=False) + "\n"
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            scratch.write_text(line, encoding="utf-8")
            try:
                os.link(scratch, path)  # fails where the file exists
            finally:
                scratch.unlink()
        except FileExistsError:
            raise UserError(f"{path}: there is such a file already; choose another name") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error

    def load(self, path: Path) -> None:
        """Go on with a saved conversation in place of this one, which stays if that fails.

        Raises:
            UserError: the file is missing or holds no conversation.
        """
        try:
            line = path.read_text(encoding="utf-8").splitlines()[0]
            messages = json.loads(line)["messages"]
            pairs = [(m["role"], m["content"]) for m in messages]
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{path}: expected one line with messages, as /save writes") from error
        system = pairs[0][1] if pairs and pairs[0][0] == "system" else ""
        body = pairs[1:] if pairs and pairs[0][0] == "system" else pairs
        roles = [role for role, _ in body]
        if roles != ["user", "assistant"] * (len(body) // 2) or not body or not _all_text(pairs):
            raise UserError(f"{path}: user and assistant do not take turns in it")
        self.system = system
        self.turns = [{"role": role, "content": content} for role, content in body]


def _all_text(pairs: list[tuple]) -> bool:
    return all(isinstance(content, str) for _, content in pairs)
