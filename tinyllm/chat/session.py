"""The chat itself: read a line, do what it says or answer it, remember."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tinyllm.chat import commands
from tinyllm.chat.speaker import Speaker, Spoken
from tinyllm.chat.terminal import ASSISTANT_PROMPT, USER_PROMPT, note, read_question, say, say_piece
from tinyllm.chat.turns import Turns
from tinyllm.errors import UserError

LEAVE = ("quit", "exit")


@dataclass
class Chat:
    """A conversation in a terminal or a pipe.

    Attributes:
        compare: whether the base answers each question too, before the adapter.
        show_stats: whether each reply is followed by its numbers.
        as_json: print replies as JSON lines, and no prompts.
    """

    speaker: Speaker
    turns: Turns
    compare: bool = False
    show_stats: bool = False
    as_json: bool = False
    last: Spoken | None = None

    @property
    def voices(self):
        return self.speaker.voices

    def run(self) -> None:
        """Talk until ``quit``, ``exit`` or the end of the input."""
        prompt = "" if self.as_json else USER_PROMPT
        while (question := read_question(prompt)) is not None:
            question = question.strip()
            if question.lower() in LEAVE or not self._take(question):
                break

    def _take(self, line: str) -> bool:
        """Answer a line or obey it; False to leave."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                return commands.obey(self, line)
            if line:
                self.ask(line[1:] if line.startswith("//") else line)
        except UserError as error:
            note(str(error))
        except KeyboardInterrupt:  # between two replies
            print()
        return True

    def ask(self, question: str) -> Spoken:
        """Answer one question and remember it.

        Raises:
            UserError: the question is too long.
        """
        messages = self.turns.messages(question)
        kept, dropped = self.speaker.fit(messages)
        if dropped:
            note(f"the oldest {dropped} question(s) no longer fit: forgotten")
            self.turns.turns = [m for m in kept if m["role"] != "system"][:-1]
        if self.compare and self.voices.current is not None:
            self.answer(kept, None)
        spoken = self.answer(kept, self.voices.current)
        if spoken.text:
            self.turns.remember(question, spoken.text)
        return spoken

    def answer(self, messages: list[dict], name: str | None) -> Spoken:
        """Let one voice answer on stdout."""
        if self.as_json:
            spoken = self.speaker.speak(messages, lambda text: None, name)
            say(json.dumps(as_json(spoken, messages[-1]["content"], name), ensure_ascii=False))
        else:
            say(
                f"{name or 'base'} {ASSISTANT_PROMPT}" if self.compare else ASSISTANT_PROMPT, end=""
            )
            spoken = self.speaker.speak(messages, say_piece, name)
            say(" [stopped]" if spoken.interrupted else "")
        self.last = spoken
        if self.show_stats:
            note(spoken.stats())
        return spoken


def as_json(spoken: Spoken, question: str, name: str | None) -> dict:
    """A reply as programs like it."""
    return {
        "question": question,
        "answer": spoken.text,
        "adapter": name,
        "stopped": spoken.stopped,
        "num_tokens": spoken.num_tokens,
        "num_prompt_tokens": spoken.num_prompt,
        "seconds": round(spoken.seconds, 4),
    }
