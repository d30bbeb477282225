"""Golden conversations: a handful of conversations with the ids that training gave them.

They lie beside an adapter.  Whoever serves it encodes them again: other ids mean that the model
would see other text than it was trained on (another tokenizer, another chat template, or another
version of a library), which shows as nonsense replies and never as an error.
"""

from __future__ import annotations

from tinyllm.errors import UserError

# Each holds what encoders have been seen to treat differently.
CONVERSATIONS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "你好"), ("assistant", "你好！我是你的助手。")),
    (("user", "1 + 23 = ?  3.14\n第二行"), ("assistant", "24。\n\n  缩进 and English words.")),
    (("user", "早上好 ☀️ 龘"), ("assistant", "早！"), ("user", "再说一遍"), ("assistant", "早上好！")),
    (("user", " leading and trailing spaces "), ("assistant", "Fine, thanks.")),
    (("user", "what does <|user|> mean?"), ("assistant", "It marks a turn.")),
)  # fmt: skip


def golden_examples(chat_format, system_prompt: str = "") -> list[dict]:
    """Encode the golden conversations, each with and without the system prompt.

    Returns:
        ``{"messages", "prompt_ids", "input_ids", "supervised"}`` for each; conversations that the
        base's own template refuses are left out.  Empty for a template that writes today's date.
    """
    if _writes_the_date(chat_format):
        return []
    examples = []
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        examples += _example(chat_format, messages)
        if system_prompt:
            system = {"role": "system", "content": system_prompt}
            examples += _example(chat_format, [system, *messages])
    return examples


def first_change(examples: list[dict], chat_format) -> str | None:
    """Name the first golden conversation that this format encodes otherwise; None if all agree."""
    for example in examples:
        messages = example["messages"]
        try:
            now = encode_example(chat_format, messages)
        except UserError as error:
            return f"{_short(messages)} cannot be encoded: {error}"
        for part in ("prompt_ids", "input_ids", "supervised"):
            if now[part] != example[part]:
                return f"{_short(messages)} {_where(part, example[part], now[part])}"
    return None


def encode_example(chat_format, messages: list[dict]) -> dict:
    """One conversation (ending with an assistant turn) as the golden file keeps it."""
    encoded = chat_format.encode(messages)
    return {
        "messages": messages,
        "prompt_ids": chat_format.encode_prompt(messages[:-1]),
        "input_ids": encoded.input_ids,
        "supervised": [int(s) for s in encoded.supervised],
    }


def _example(chat_format, messages: list[dict]) -> list[dict]:
    try:
        return [encode_example(chat_format, messages)]
    except UserError:
        return []


def _writes_the_date(chat_format) -> bool:
    """Such a template (Llama 3.2's) gives other ids every day."""
    template = getattr(getattr(chat_format, "tokenizer", None), "chat_template", None)
    return "strftime" in str(template or "")


def _where(part: str, before: list[int], now: list[int]) -> str:
    pairs = list(zip(before, now, strict=False))
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    was = before[place] if place < len(before) else "nothing"
    here = now[place] if place < len(now) else "nothing"
    what = "supervision" if part == "supervised" else "id"
    return f"has another {what} at position {place}: {was} when it was trained, {here} here"


def _short(messages: list[dict]) -> str:
    text = next(m["content"] for m in messages if m["role"] == "user")
    return f"the conversation {text[:24]!r}"
