"""A SentencePiece-like BPE tokenizer (Gemma's, Llama 2's) as the fields of a GGUF file.

llama.cpp knows no merges for such a vocabulary.  It joins any two neighbours whose text is a token,
the one with the highest score first (its file src/llama-vocab.cpp), so each token's score must say
when its merges come, and each way to cut a token in two must be a merge.  Both are checked here:
where they do not hold, llama.cpp would give other ids without a word.
"""

from __future__ import annotations

import json

from tinyllm.chat_format import chat_format_of
from tinyllm.errors import UserError
from tinyllm.golden import CONVERSATIONS

SPACE = "▁"
BYTES = [f"<0x{value:02X}>" for value in range(256)]
BYTE_SET = frozenset(BYTES)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Tokens that no merge makes: single characters, bytes and markers are never looked up by score.
NO_MERGE = -1e6
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Prepend", "prepend": SPACE}
# Steps before the merges -> whether a space is put before each stretch of text.
SPACINGS = {False: [REPLACE], True: [PREPEND, REPLACE]}


def is_sentencepiece(content: dict) -> bool:
    """Whether a tokenizer's own description is of this kind: BPE over characters, then bytes."""
    return content["model"]["type"] == "BPE" and bool(content["model"].get("byte_fallback"))


def check_sentencepiece(tokenizer, content: dict) -> tuple[dict[str, int], bool]:
    """What llama.cpp must be told: when each token is made, and whether spaces are put before text.

    Raises:
        UserError: llama.cpp would not work as this tokenizer does.
    """
    for token in content["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise _refused(f"its marker {token['content']!r} looks at the text beside it")
    return merge_order(content), space_prefix(tokenizer, content)


def add_sentencepiece(
    writer, tokenizer, content: dict, tokens: list[str], types: list[int]
) -> None:
    """Write tokens, their types and scores, and how spaces are written.

    Args:
        writer: a ``gguf.GGUFWriter``.
        content: the tokenizer's own description, as ``tokenizer.json`` holds it.
        tokens, types: by id, as for a byte-level vocabulary.

    Raises:
        UserError: llama.cpp would give other ids.
    """
    order, prefix = check_sentencepiece(tokenizer, content)
    unknown = tokenizer.unk_token
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([float(-order[t]) if t in order else NO_MERGE for t in tokens])
    kinds = zip(tokens, types, strict=True)
    writer.add_token_types([token_type(t, kind, unknown, order) for t, kind in kinds])
    writer.add_add_space_prefix(prefix)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)


def token_type(token: str, kind: int, unknown: str | None, order: dict[str, int]) -> int:
    """Type of a token in such a vocabulary, from that in a byte-level one.

    llama.cpp writes a user-defined token as it stands, so one of spaces must be a normal one, whose
    sign for a space it turns back; its merges find it.
    """
    if token == unknown:
        return UNKNOWN
    if kind == NORMAL and token in BYTE_SET:
        return BYTE
    if kind == USER_DEFINED and SPACE in token and token in order:
        return NORMAL
    return kind


def merge_order(content: dict) -> dict[str, int]:
    """Tokens that merges make, and when: the first made is 0.

    Raises:
        UserError: the merges cannot be told by one score for each token, or some are missing.
    """
    model = content["model"]
    if any(
        model.get(k) for k in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        raise _refused("it takes whole words or marks their parts")
    missing = [name for name in BYTES if name not in model["vocab"]]
    if missing:
        raise _refused(f"it has no token for the byte {missing[0]}")
    pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    order, last = {}, None
    for made in (left + right for left, right in pairs):
        if made != last and made in order:
            raise _refused(f"merges that make {made!r} come before and after others")
        order.setdefault(made, len(order))
        last = made
    _check_every_cut(content, set(pairs))
    return order


def _check_every_cut(content: dict, pairs: set[tuple[str, str]]) -> None:
    """Raise a UserError for a token that llama.cpp can join from parts which no merge names."""
    vocab = content["model"]["vocab"]
    markers = {token["content"] for token in content["added_tokens"]}

    def is_symbol(text: str) -> bool:
        return len(text) == 1 or text in vocab

    for token in vocab.keys() - markers:
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if is_symbol(left) and is_symbol(right) and (left, right) not in pairs:
                raise _refused(f"no merge makes {token!r} from {left!r} and {right!r}")


def space_prefix(tokenizer, content: dict) -> bool:
    """Whether a space is put before each stretch of text between markers.

    Where a tokenizer's own rule is neither (``Metaspace`` looks whether a space is there already, or
    only at the very beginning), the golden conversations decide which of the two gives its ids.

    Raises:
        UserError: neither does, or text is changed in another way.
    """
    steps = _steps(content.get("normalizer"), "normalizers")
    cuts = _steps(content.get("pre_tokenizer"), "pretokenizers")
    plain = all(cut["type"] == "Split" and cut["pattern"] == {"String": " "} for cut in cuts)
    for prefix, expected in SPACINGS.items():
        if steps == expected and plain:  # no space is left to split at
            return prefix
    if steps or len(cuts) != 1 or not _is_metaspace(cuts[0]):
        names = ", ".join(step["type"] for step in (*steps, *cuts)) or "nothing"
        raise _refused(f"it prepares text by {names}")
    if cuts[0].get("prepend_scheme") == "never":
        return False
    for prefix in SPACINGS:
        if _same_ids(tokenizer, content, prefix):
            return prefix
    raise _refused("where it puts a space before text, llama.cpp would not")


def _same_ids(tokenizer, content: dict, prefix: bool) -> bool:
    """Whether the golden conversations, rendered, have the same ids by llama.cpp's rule."""
    from tokenizers import Tokenizer

    spacing = {"type": "Sequence", "normalizers": SPACINGS[prefix]}
    changed = json.dumps(content | {"normalizer": spacing, "pre_tokenizer": None})
    other, chat_format = Tokenizer.from_str(changed), chat_format_of(tokenizer)
    same = []
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": text} for role, text in turns[:-1]]
        try:
            text = chat_format.render(messages, add_generation_prompt=True)
        except UserError:  # the base's own template refuses this one
            continue
        expected = tokenizer(text, add_special_tokens=False).input_ids
        same.append(other.encode(text, add_special_tokens=False).ids == expected)
    return bool(same) and all(same)


def _steps(outer: dict | None, inner: str) -> list[dict]:
    if outer is None:
        return []
    return outer[inner] if outer["type"] == "Sequence" else [outer]


def _is_metaspace(step: dict) -> bool:
    return (
        step["type"] == "Metaspace"
        and step.get("replacement") == SPACE
        and step.get("split", True) is False
    )


def _refused(reason: str) -> UserError:
    return UserError(
        f"GGUF: llama.cpp cannot work as this SentencePiece-like tokenizer does: {reason}; export a "
        "Hugging Face folder (--export hf)"
    )
