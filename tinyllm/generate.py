"""Messages → streamed reply; knows nothing about training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from tinyllm.base import context_length

UNFINISHED = "\ufffd"  # what an incomplete UTF-8 character decodes to


@dataclass(frozen=True)
class Reply:
    """A generated reply; ``stopped`` tells whether the model ended it by itself."""

    text: str
    num_tokens: int
    stopped: bool


class TextStream(BaseStreamer):
    """Hands on new text as ids arrive, holding back bytes of an unfinished character."""

    def __init__(self, tokenizer, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] = []
        self.shown = ""
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:  # generate() hands over the prompt first
            self.prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith(UNFINISHED):
            self._show(text)

    def end(self) -> None:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        self._show(text.rstrip(UNFINISHED))

    def _show(self, text: str) -> None:
        if len(text) > len(self.shown):
            self.on_text(text[len(self.shown) :])
            self.shown = text


def stop_ids(model, chat_format) -> list[int]:
    """Ids that end a reply: the base's own, and the one that training put after every answer."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = {chat_format.encode(probe).input_ids[-1]}
    own = model.generation_config.eos_token_id
    ids |= set(own if isinstance(own, list) else [own]) - {None}
    return sorted(ids)


@torch.inference_mode()
def generate_reply(
    model,
    tokenizer,
    chat_format,
    messages: list[dict],
    on_text: Callable[[str], None] = lambda text: None,
    max_new_tokens: int = 256,
    **sampling,
) -> Reply:
    """Write the next assistant turn of a conversation.

    Args:
        messages: a conversation that ends with a user turn.
        on_text: called with each new piece of text as soon as it is whole.
        max_new_tokens: longest reply, in tokens.
        sampling: options of ``transformers.GenerationConfig``; unset ones are the base's own.

    Returns:
        The reply; cut at ``max_new_tokens`` or the end of the context its ``stopped`` is False.
    """
    prompt = torch.tensor([chat_format.encode_prompt(messages)], device=model.device)
    room = context_length(model) - prompt.shape[1]
    stops = stop_ids(model, chat_format)
    stream = TextStream(tokenizer, on_text)
    config = GenerationConfig.from_dict(
        {
            **model.generation_config.to_dict(),
            "max_new_tokens": max(1, min(max_new_tokens, room)),
            "max_length": None,
            "eos_token_id": stops,
            "pad_token_id": tokenizer.pad_token_id,
            **sampling,
        }
    )
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=config,
        streamer=stream,
    )
    ids = output[0, prompt.shape[1] :].tolist()
    stopped = bool(ids) and ids[-1] in stops
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return Reply(text.strip(), len(ids), stopped)


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
