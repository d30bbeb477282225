"""Questions → replies, many at once, without sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from tinyllm.base import context_length
from tinyllm.chat_format import with_system_prompt
from tinyllm.generate import UNFINISHED, stop_ids
from tinyllm.records import Record

BATCH = 16


@dataclass(frozen=True)
class Question:
    """Something to answer: a conversation up to the reply, and the reply the data has, if any."""

    messages: list[dict]
    gold: str | None = None

    @property
    def text(self) -> str:
        return next(m["content"] for m in reversed(self.messages) if m["role"] == "user")


def question_of(record: Record, system_prompt: str) -> Question | None:
    """The last question of a record and its answer; None when it has none."""
    turns = [i for i, message in enumerate(record.messages) if message["role"] == "assistant"]
    if not turns or not any(m["role"] == "user" for m in record.messages[: turns[-1]]):
        return None
    messages = with_system_prompt(record.messages[: turns[-1]], system_prompt)
    return Question(messages, record.messages[turns[-1]]["content"])


def questions_of(records: list[Record], system_prompt: str, limit: int) -> list[Question]:
    """Questions of at most ``limit`` records, spread evenly over them."""
    found = [q for r in records if (q := question_of(r, system_prompt)) is not None]
    limit = min(limit, len(found))
    return [found[i * len(found) // limit] for i in range(limit)] if limit else []


def user_questions(prompts: list[str], system_prompt: str) -> list[Question]:
    """The user's own questions as conversations."""
    return [
        Question(with_system_prompt([{"role": "user", "content": p}], system_prompt))
        for p in prompts
    ]


@torch.inference_mode()
def reply_to_all(
    model, tokenizer, chat_format, questions: list[Question], max_new_tokens: int
) -> list[dict]:
    """Answer every question with the likeliest tokens (greedy), in batches padded on the left.

    Returns:
        For each question ``text``, ``num_tokens`` and whether the reply ``stopped`` by itself.
    """
    stops = stop_ids(model, chat_format)
    prompts = [chat_format.encode_prompt(question.messages) for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies: list[dict] = [{}] * len(prompts)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        batch = [prompts[i] for i in chosen]
        found = _generate(model, tokenizer, batch, stops, max_new_tokens)
        for i, ids in zip(chosen, found, strict=True):
            replies[i] = _reply(ids, stops, tokenizer)
    return replies


def _generate(model, tokenizer, prompts, stops, max_new_tokens) -> list[list[int]]:
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    room = context_length(model) - longest
    if room < 1:  # a prompt that fills the context leaves nothing to say
        return [[] for _ in prompts]
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    config = GenerationConfig(
        max_new_tokens=min(max_new_tokens, room), do_sample=False, eos_token_id=stops,
        pad_token_id=pad,
    )  # fmt: skip
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return output[:, longest:].tolist()


def _reply(ids: list[int], stops: list[int], tokenizer) -> dict:
    end = next((place for place, i in enumerate(ids) if i in stops), None)
    said = ids if end is None else ids[:end]
    text = tokenizer.decode(said, skip_special_tokens=True).replace(UNFINISHED, "").strip()
    return {"text": text, "num_tokens": len(said), "stopped": end is not None}
