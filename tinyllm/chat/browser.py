"""What happens behind the web page: turns in, growing replies out; knows nothing of the page."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import dataclass, replace
from threading import Event, Lock, Thread

from tinyllm.chat.options import check_option
from tinyllm.chat.speaker import Speaker
from tinyllm.chat.turns import Turns
from tinyllm.errors import UserError

BASE = "base"


@dataclass(frozen=True)
class Wishes:
    """What a visitor has set on the page.

    Attributes:
        voice: an adapter's name, or ``BASE``.
        temperature: 0 for the likeliest token always.
    """

    voice: str
    compare: bool
    system: str
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    max_new_tokens: int


class Browser:
    """Answers for all visitors of the page, one reply at a time."""

    def __init__(self, speaker: Speaker) -> None:
        self.speaker, self.lock = speaker, Lock()

    @property
    def voices(self) -> list[str]:
        voices = self.speaker.voices
        return voices.names if voices.merged else [*voices.names, BASE]

    def defaults(self, system: str) -> Wishes:
        """The settings that the command line and the base itself give."""
        config = self.speaker.config(1)
        return Wishes(
            voice=self.speaker.voices.current or BASE,
            compare=False,
            system=system,
            temperature=float(config.temperature or 1.0) if config.do_sample else 0.0,
            top_p=float(config.top_p or 1.0),
            top_k=50 if config.top_k is None else config.top_k,
            repetition_penalty=float(config.repetition_penalty or 1.0),
            max_new_tokens=self.speaker.max_new_tokens,
        )

    def reply(
        self, turns: list[dict], question: str, wishes: Wishes
    ) -> Iterator[tuple[str, str, str]]:
        """Answer a question; closing the iterator stops the reply.

        Args:
            turns: the conversation before it.

        Yields:
            What has been written so far: by the base (empty without comparison), by the voice asked
            for, and a remark (turns that no longer fit).

        Raises:
            UserError: the question is too long, or a setting makes no sense.
        """
        speaker = self._speaker(wishes)
        kept, dropped = speaker.fit(Turns(wishes.system.strip(), list(turns)).messages(question))
        remark = f"the oldest {dropped} question(s) no longer fit: forgotten" if dropped else ""
        name = None if wishes.voice == BASE else wishes.voice
        base = ""
        if wishes.compare and name is not None:
            for base in self._stream(speaker, kept, None):
                yield base, "", remark
        for text in self._stream(speaker, kept, name):
            yield base, text, remark

    def _speaker(self, wishes: Wishes) -> Speaker:
        if wishes.voice not in self.voices:
            raise UserError(f"no adapter {wishes.voice!r}")
        options = {"repetition_penalty": wishes.repetition_penalty}
        if wishes.temperature > 0:
            options |= {
                "temperature": wishes.temperature,
                "top_p": wishes.top_p,
                "top_k": wishes.top_k,
            }
        for name, value in options.items():
            check_option(name, value)
        sampling = options | {"do_sample": wishes.temperature > 0}
        most = max(1, int(wishes.max_new_tokens))
        return replace(self.speaker, sampling=sampling, max_new_tokens=most)

    def _stream(self, speaker: Speaker, messages: list[dict], name: str | None) -> Iterator[str]:
        """The text so far, each time there is more; closing the iterator stops the model."""
        pieces: queue.SimpleQueue = queue.SimpleQueue()
        stopped, text = Event(), ""

        def write() -> None:
            try:
                with self.lock:  # held by the writing alone: a visitor who leaves holds up nobody
                    speaker.speak(messages, pieces.put, name, lambda: not stopped.is_set())
                pieces.put(None)
            except Exception as error:  # carried over to the visitor's own thread, raised there
                pieces.put(error)

        writer = Thread(target=write, daemon=True)
        writer.start()
        try:
            while True:
                piece = pieces.get()
                while isinstance(piece, str):
                    text += piece
                    piece = "" if pieces.empty() else pieces.get()
                    if piece == "":
                        break
                yield text
                if isinstance(piece, Exception):
                    raise piece
                if piece is None:
                    return
        finally:
            stopped.set()
            writer.join()
