"""A conversation that is too long → a shorter one: oldest turns first, never the last answer."""

from __future__ import annotations

from tinyllm.chat_format import Encoded

# No usual text has more characters to a token; it only bounds the search in a huge prompt.
MOST_CHARACTERS_PER_TOKEN = 64


def shorten(messages: list[dict], chat_format, max_length: int) -> Encoded | None:
    """Take out the oldest whole turns, as few as needed, then the middle of the last prompt.

    Example, where two question-answer pairs fit:  [s, q1, a1, q2, a2, q3, a3] → [s, q2, a2, q3, a3]

    Returns:
        The encoded example, which ends as the whole one did; None when nothing that is learned fits.
    """
    system = messages[:1] if messages[0]["role"] == "system" else []
    body = messages[len(system) :]
    # fewer pairs left out make it longer, so the number can be searched for by halving
    best, low, high = None, 1, len(body) // 2 - 1
    while low <= high:
        left_out = (low + high) // 2
        example = _fitting([*system, *body[2 * left_out :]], chat_format, max_length)
        if example is None:
            low = left_out + 1
        else:
            best, high = example, left_out - 1
    if best is None:
        best = _cut_prompt([*system, *body[-2:]], chat_format, max_length)
    return best if best is not None and any(best.supervised) else None


def _fitting(messages: list[dict], chat_format, max_length: int) -> Encoded | None:
    example = chat_format.encode(messages)
    return example if len(example.input_ids) <= max_length else None


def _cut_prompt(messages: list[dict], chat_format, max_length: int) -> Encoded | None:
    """Longest prompt that fits when characters are taken from its middle (by halving)."""
    prompt, best = messages[-2]["content"], None
    low, high = 1, min(len(prompt) - 1, max_length * MOST_CHARACTERS_PER_TOKEN)
    while low <= high:
        keep = (low + high) // 2
        cut = prompt[: (keep + 1) // 2] + "…" + prompt[len(prompt) - keep // 2 :]
        shorter = [*messages[:-2], messages[-2] | {"content": cut}, messages[-1]]
        example = _fitting(shorter, chat_format, max_length)
        if example is None:
            high = keep - 1
        else:
            best, low = example, keep + 1
    return best
