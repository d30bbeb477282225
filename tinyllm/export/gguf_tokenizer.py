"""A tokenizer as the fields of a GGUF file: byte-level BPE here, SentencePiece-like ones beside it."""

from __future__ import annotations

import json
import re

from tinyllm.chat_format import chat_format_of
from tinyllm.errors import UserError
from tinyllm.export.gguf_sentencepiece import (
    add_sentencepiece,
    check_sentencepiece,
    is_sentencepiece,
)

# llama.cpp knows a tokenizer's way of splitting text by a name; these are the splits it has.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
SPLIT_NAMES = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (LLAMA3_SPLIT, "bytes only"): "llama-bpe",
    (QWEN2_SPLIT, "bytes only"): "qwen2",
}


def add_tokenizer(writer, tokenizer, vocab_size: int) -> None:
    """Write a tokenizer's fields.

    Args:
        writer: a ``gguf.GGUFWriter``.
        vocab_size: rows of the model's embedding, which may be more than the tokenizer has tokens.

    Raises:
        UserError: as :func:`check_tokenizer`, or it has more tokens than the model has rows.
    """
    content = tokenizer_json(tokenizer)
    tokens, types = token_list(tokenizer, vocab_size)
    if is_sentencepiece(content):
        add_sentencepiece(writer, tokenizer, content, tokens, types)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_name(content))
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges_of(content))
    add_markers(writer, tokenizer)


def add_markers(writer, tokenizer) -> None:
    """Write which tokens begin, end and fill a text, what ends a turn, and the chat template."""
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    first = tokenizer("a").input_ids[:1]
    writer.add_add_bos_token(first == [tokenizer.bos_token_id])
    turn = end_of_turn(tokenizer)
    if turn not in (None, tokenizer.eos_token_id):
        writer.add_eot_token_id(turn)
    writer.add_chat_template(without_generation_tags(tokenizer.chat_template))


def end_of_turn(tokenizer) -> int | None:
    """Id of the marker that the chat template sets behind a reply; None where there is none."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        encoded = chat_format_of(tokenizer).encode(turns)
    except UserError:  # a template that refuses this names no end either
        return None
    learned = [label for label in encoded.labels if label >= 0]
    return learned[-1] if learned and learned[-1] in tokenizer.added_tokens_decoder else None


def check_tokenizer(tokenizer) -> None:
    """Raise a UserError for a tokenizer that llama.cpp has no way to work as."""
    content = tokenizer_json(tokenizer)
    if is_sentencepiece(content):
        check_sentencepiece(tokenizer, content)
    else:
        split_name(content)


def tokenizer_json(tokenizer) -> dict:
    """The tokenizer's own description; a UserError for a kind that has no place in GGUF."""
    if not tokenizer.is_fast:
        raise UserError("GGUF: this tokenizer has no tokenizer.json; it cannot be written")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = content["model"]["type"]
    if kind != "BPE" or not (is_sentencepiece(content) or _is_byte_level(content)):
        raise UserError(
            "GGUF: only BPE tokenizers over bytes, or over characters with bytes to fall back to, "
            f"can be written here; this one is {kind}"
        )
    return content


def split_name(content: dict) -> str:
    """llama.cpp's name for the way a tokenizer splits text before merging."""
    steps = tuple(_step(step) for step in _pre_tokenizers(content))
    name = SPLIT_NAMES.get(steps)
    normalizer = (content.get("normalizer") or {}).get("type")
    if name is None or normalizer not in (None, "NFC"):
        raise UserError(
            f"GGUF: llama.cpp has no name that we know for this tokenizer's splitting {steps}"
            f"{f' after {normalizer}' if normalizer else ''}; use the converter of llama.cpp"
        )
    if content["model"].get("ignore_merges") and name != "llama-bpe":
        raise UserError("GGUF: a tokenizer that skips merges for whole words cannot be written")
    return name


def token_list(tokenizer, vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens by id, and their types: 1 normal, 3 control, 4 defined by the user, 5 unused."""
    added = tokenizer.added_tokens_decoder
    by_id = {  # a marker without a row (Gemma's for images) can stand in no text of this model
        index: token
        for token, index in tokenizer.get_vocab().items()
        if index < vocab_size or not (index in added and added[index].special)
    }
    if max(by_id) >= vocab_size:
        raise UserError(
            f"GGUF: token id {max(by_id)} lies beyond the embedding's {vocab_size} rows"
        )
    tokens, types = [], []
    for index in range(vocab_size):
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        if index not in by_id:
            types.append(5)
        elif index in added:
            types.append(3 if added[index].special else 4)
        else:
            types.append(1)
    return tokens, types


def merges_of(content: dict) -> list[str]:
    """Merges as ``"a b"``; tokenizers writes pairs since 0.20."""
    return [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]


def without_generation_tags(template: str) -> str:
    """A chat template without the tags of transformers that mark what is learned.

    llama.cpp's template engine need not know them; a condition that always holds renders the same.
    """
    template = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", template)


def _pre_tokenizers(content: dict) -> list[dict]:
    outer = content.get("pre_tokenizer") or {"type": "none"}
    return outer["pretokenizers"] if outer["type"] == "Sequence" else [outer]


def _is_byte_level(content: dict) -> bool:
    return any(step["type"] == "ByteLevel" for step in _pre_tokenizers(content))


def _step(step: dict) -> str:
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "bytes" if step.get("use_regex", True) else "bytes only"
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return step["pattern"].get("Regex", "?")
    return f"{kind}?"
