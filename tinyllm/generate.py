"""Messages → streamed reply; knows nothing about training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from tinyllm.base import context_length
from tinyllm.decode.plain import PlainEngine

UNFINISHED = "\ufffd"  # what an incomplete UTF-8 character decodes to


@dataclass(frozen=True)
class Reply:
    """A generated reply; ``stopped`` tells whether the model ended it by itself."""

    text: str
    num_tokens: int
    stopped: bool


class TextStream:
    """Hands on new text as ids arrive, holding back bytes of an unfinished character.

    Only the newest ids are decoded again, so a long reply costs no more per id than a short one.
    """

    def __init__(self, tokenizer, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] = []
        self.start = self.shown = (
            0  # ids before `shown` are on the screen, those from `start` decoded
        )

    def put(self, one: int) -> None:
        """Take in one more id."""
        self.ids.append(one)
        text = self._decode(self.start, len(self.ids))
        if not text.endswith(UNFINISHED):
            self._show(text)

    def end(self) -> None:
        """No more ids will come: show what is whole of what is left."""
        self._show(self._decode(self.start, len(self.ids)))

    def _show(self, text: str) -> None:
        new = text[len(self._decode(self.start, self.shown)) :].replace(UNFINISHED, "")
        self.start, self.shown = self.shown, len(self.ids)
        if new:
            self.on_text(new)

    def _decode(self, start: int, end: int) -> str:
        return self.tokenizer.decode(self.ids[start:end], skip_special_tokens=True)


def stop_ids(model, chat_format) -> list[int]:
    """Ids that end a reply: the base's own, and the one that training put after every answer."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = {chat_format.encode(probe).input_ids[-1]}
    own = model.generation_config.eos_token_id
    ids |= set(own if isinstance(own, list) else [own]) - {None}
    return sorted(ids)


def reply_config(
    model, tokenizer, chat_format, prompt_length: int, max_new_tokens: int, **sampling
) -> GenerationConfig:
    """How a reply to a prompt is generated: the base's own options, changed by ``sampling``.

    Args:
        prompt_length: in tokens; the reply ends where the base's context does.
        sampling: options of ``transformers.GenerationConfig``.
    """
    room = context_length(model) - prompt_length
    return GenerationConfig.from_dict(
        {
            **model.generation_config.to_dict(),
            "max_new_tokens": max(1, min(max_new_tokens, room)),
            "max_length": None,
            "eos_token_id": stop_ids(model, chat_format),
            "pad_token_id": tokenizer.pad_token_id,
            **sampling,
        }
    )


def as_reply(tokenizer, ids: list[int], stops: list[int]) -> Reply:
    """Generated ids as text; bytes that are no character are left out."""
    text = tokenizer.decode(ids, skip_special_tokens=True).replace(UNFINISHED, "")
    return Reply(text.strip(), len(ids), bool(ids) and ids[-1] in stops)


@torch.inference_mode()
def generate_reply(
    model,
    tokenizer,
    chat_format,
    messages: list[dict],
    on_text: Callable[[str], None] = lambda text: None,
    max_new_tokens: int = 256,
    engine=None,
    **sampling,
) -> Reply:
    """Write the next assistant turn of a conversation.

    Args:
        messages: a conversation that ends with a user turn.
        on_text: called with each new piece of text as soon as it is whole.
        max_new_tokens: longest reply, in tokens.
        engine: what writes the ids (:mod:`tinyllm.decode`); None for ``model.generate``.
        sampling: options of ``transformers.GenerationConfig``; unset ones are the base's own.

    Returns:
        The reply; cut at ``max_new_tokens`` or the end of the context its ``stopped`` is False.
    """
    prompt = chat_format.encode_prompt(messages)
    config = reply_config(model, tokenizer, chat_format, len(prompt), max_new_tokens, **sampling)
    stream = TextStream(tokenizer, on_text)
    ids = (engine or PlainEngine(model)).write(prompt, config, stream.put)
    stream.end()
    return as_reply(tokenizer, ids, config.eos_token_id)


def fit_history(
    messages: list[dict], chat_format, context: int, reserve: int
) -> tuple[list[dict], int]:
    """Drop the oldest whole turns until the prompt leaves room for a reply.

    Args:
        context: longest sequence, in tokens.
        reserve: tokens to keep free for the reply.

    Returns:
        The messages that remain (system turn and last question always do), and how many
        question/answer pairs were dropped.
    """
    system = messages[:1] if messages[0]["role"] == "system" else []
    body, dropped = messages[len(system) :], 0
    while len(body) > 1 and len(chat_format.encode_prompt([*system, *body])) + reserve > context:
        body, dropped = body[2:], dropped + 1
    return [*system, *body], dropped
