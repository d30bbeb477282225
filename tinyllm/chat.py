"""The chat in a terminal or a pipe: ask, stream the reply, remember."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from tinyllm.base import context_length
from tinyllm.generate import fit_history, generate_reply

USER_PROMPT, ASSISTANT_PROMPT = "用户: ", "助手: "
LEAVE = ("quit", "exit")


@dataclass
class Chat:
    """A conversation with a model.

    Attributes:
        max_length: longest prompt in tokens; older turns are dropped beyond it, and it is said.
        sampling: options of ``transformers.GenerationConfig``.
    """

    model: object
    tokenizer: object
    chat_format: object
    system_prompt: str
    max_length: int
    max_new_tokens: int
    sampling: dict = field(default_factory=dict)
    turns: list[dict] = field(default_factory=list)

    def run(self) -> None:
        """Talk until ``quit``, ``exit`` or the end of the input."""
        while (question := read_question()) is not None:
            if question.strip().lower() in LEAVE:
                break
            if question.strip():
                self.ask(question.strip())

    def ask(self, question: str) -> str:
        """Answer one question on stdout; Ctrl-C stops the reply and keeps what was said."""
        self.turns.append({"role": "user", "content": question})
        messages = self._messages()
        if messages is None:
            self.turns.pop()
            return ""
        shown: list[str] = []
        print(ASSISTANT_PROMPT, end="", flush=True)
        try:
            reply = generate_reply(
                self.model, self.tokenizer, self.chat_format, messages,
                on_text=lambda text: self._show(text, shown),
                max_new_tokens=self.max_new_tokens, **self.sampling,
            )  # fmt: skip
            text = reply.text
        except KeyboardInterrupt:
            text = "".join(shown).strip()
            print(" [stopped]", end="")
        print(flush=True)
        self._remember(text)
        return text

    def _messages(self) -> list[dict] | None:
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        context = min(self.max_length, context_length(self.model) - 1)
        reserve = min(self.max_new_tokens, context // 4)
        messages, dropped = fit_history([*system, *self.turns], self.chat_format, context, reserve)
        if dropped:
            note(f"the oldest {dropped} question(s) no longer fit into {context} tokens: forgotten")
            self.turns = messages[len(system) :]
        length = len(self.chat_format.encode_prompt(messages))
        if length + reserve > context:
            most = context - reserve
            note(f"that is {length} tokens, at most {most} fit: please ask in fewer words")
            return None
        return messages

    def _remember(self, text: str) -> None:
        if text:
            self.turns.append({"role": "assistant", "content": text})
        else:
            self.turns.pop()

    @staticmethod
    def _show(text: str, shown: list[str]) -> None:
        shown.append(text)
        print(text, end="", flush=True)


def read_question() -> str | None:
    """The next line of the input; None at its end or on Ctrl-C while nothing is being said."""
    try:
        question = input(USER_PROMPT)
        question.encode("utf-8")  # bytes that are no UTF-8 arrive as lone surrogates
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    except UnicodeError:
        note("that was not UTF-8 text; please type it again")
        return ""
    return question


def note(text: str) -> None:
    """A remark about the chat itself, kept apart from what the model says."""
    print(f"({text})", file=sys.stderr, flush=True)
