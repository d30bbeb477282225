"""One question → one reply, within the limits, by whoever is to answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tinyllm.base import context_length
from tinyllm.chat.voices import Voices
from tinyllm.errors import UserError
from tinyllm.generate import TextStream, as_reply, fit_history, reply_config


@dataclass(frozen=True)
class Spoken:
    """A reply and what it took.

    Attributes:
        text: the reply; the part that was written before an interrupt.
        stopped: whether the model ended it by itself.
        interrupted: whether the user did.
        first_seconds: until the first id.
    """

    text: str
    num_tokens: int
    stopped: bool
    interrupted: bool
    num_prompt: int
    num_reused: int
    seconds: float
    first_seconds: float
    engine: str

    def stats(self) -> str:
        """The numbers in one line."""
        rest = self.seconds - self.first_seconds
        speed = (
            f"{(self.num_tokens - 1) / rest:.0f} tokens/s, " if self.num_tokens > 1 and rest else ""
        )
        reused = f" ({self.num_reused} known from before)" if self.num_reused else ""
        return (
            f"{self.num_tokens} tokens, {speed}first after {self.first_seconds:.3f} s, "
            f"prompt {self.num_prompt} tokens{reused}, engine {self.engine}"
        )


@dataclass
class Speaker:
    """Writes replies with the settings of a chat.

    Attributes:
        max_length: longest prompt in tokens.
        sampling: options of ``transformers.GenerationConfig``.
    """

    voices: Voices
    chat_format: object
    max_length: int = 512
    max_new_tokens: int = 256
    sampling: dict = field(default_factory=dict)

    @property
    def context(self) -> int:
        """Longest prompt and reply together."""
        return context_length(self.voices.maker.plain)

    def fit(self, messages: list[dict]) -> tuple[list[dict], int]:
        """Drop the oldest whole turns that do not fit; returns what is left and how many went.

        Raises:
            UserError: the last question alone is too long.
        """
        context = min(self.max_length, self.context - 1)
        reserve = min(self.max_new_tokens, context // 4)
        kept, dropped = fit_history(messages, self.chat_format, context, reserve)
        length = len(self.chat_format.encode_prompt(kept))
        if length + reserve > context:
            most = context - reserve
            raise UserError(
                f"that is {length} tokens, at most {most} fit: please ask in fewer words"
            )
        return kept, dropped

    def config(self, prompt_length: int):
        """How a reply to a prompt of so many tokens is generated."""
        return reply_config(
            self.voices.maker.plain, self.voices.tokenizer, self.chat_format, prompt_length,
            self.max_new_tokens, **self.sampling,
        )  # fmt: skip

    def engine(self, name: str | None, config):
        """The engine that can follow a config as this adapter (None: as the base)."""
        engine = self.voices.engine(name)
        objection = engine.objection(config)
        if objection is None:
            return engine
        if self.voices.maker.kind == "fast":
            raise UserError(f"--engine fast: {objection}")
        return self.voices.maker.plain_engine(self.voices.adapters.get(name), objection)

    def speak(
        self, messages: list[dict], on_text: Callable[[str], None], name: str | None,
        keep_going: Callable[[], bool] = lambda: True,
    ) -> Spoken:  # fmt: skip
        """Write the reply to messages that fit; Ctrl-C ends it early.

        Args:
            name: the adapter that answers, None for the base.
            keep_going: asked at each token; False ends the reply as Ctrl-C does.
        """
        prompt = self.chat_format.encode_prompt(messages)
        config = self.config(len(prompt))
        stream, started, first = TextStream(self.voices.tokenizer, on_text), time.perf_counter(), []
        engine, interrupted = self.engine(name, config), False

        def on_id(one: int) -> None:
            if not first:
                first.append(time.perf_counter() - started)
            if not keep_going():
                raise KeyboardInterrupt
            stream.put(one)

        try:
            engine.write(prompt, config, on_id)
            stream.end()
        except KeyboardInterrupt:
            interrupted = True
        seconds = time.perf_counter() - started
        reply = as_reply(self.voices.tokenizer, stream.ids, config.eos_token_id)
        return Spoken(
            reply.text, reply.num_tokens, reply.stopped, interrupted, len(prompt),
            getattr(engine, "num_reused", 0), seconds, first[0] if first else seconds,
            f"{engine.name} ({engine.why})" if engine.why else engine.name,
        )  # fmt: skip
