"""Bits per character on held-out text: comparable between models with different tokenizers."""

import math
import random

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PASSAGE_CHARACTERS = 200


def passages(texts: list[str], num_passages: int, seed: int = 0) -> list[str]:
    """Short passages of about `PASSAGE_CHARACTERS`: whole lines of one text, or several short
    texts (sentences) joined by newlines; a fixed random choice of them.
    """
    result: list[str] = []
    for text in ["\n".join(texts)] if max(map(len, texts), default=0) < 100 else texts:
        passage = ""
        for line in text.split("\n"):
            passage += ("\n" if passage else "") + line[: 2 * PASSAGE_CHARACTERS]
            if len(passage) >= PASSAGE_CHARACTERS:
                result.append(passage)
                passage = ""
        if len(passage) >= PASSAGE_CHARACTERS // 2 or not result:
            result.append(passage)
    random.Random(seed).shuffle(result)
    return [p for p in result if p][:num_passages]


@torch.no_grad()
def bits_per_character(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    batch_size: int = 8,
) -> float:
    """Mean bits per character. The first token of a passage is context only, unless the tokenizer
    puts a begin token before it; the characters of an unscored token are not counted.
    """
    bits, characters = 0.0, 0
    ordered = sorted(texts, key=len)
    was_training = model.training
    model.eval()
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        ids = [tokenizer(text)["input_ids"] for text in batch]
        length = max(map(len, ids))
        filled = [
            row + [row[-1]] * (length - len(row)) for row in ids
        ]  # causal: the rest is unseen
        input_ids = torch.tensor(filled, device=model.device)  # (B, T)
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")
        for text, row, loss in zip(batch, ids, losses, strict=True):
            bits += loss[: len(row) - 1].sum().item() / math.log(2)
            characters += len(text) - unscored_characters(tokenizer, row)
    model.train(was_training)
    return bits / max(1, characters)


def unscored_characters(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """Characters in the first token (0 when it is a begin token)."""
    if ids[0] in tokenizer.all_special_ids:
        return 0
    return len(tokenizer.decode(ids[:1]).strip("\ufffd"))
