"""SentencePiece-like tokenizers in GGUF: what llama.cpp would do otherwise is refused in one line."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import TEXTS, make_model
from gemma_parts import SIZE, spaced_tokenizer, vocabulary

from tinyllm.base import load_base
from tinyllm.chat_format import chat_format_of
from tinyllm.errors import UserError
from tinyllm.export.gguf_sentencepiece import (
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    merge_order,
    space_prefix,
    token_type,
)
from tinyllm.export.gguf_tokenizer import check_tokenizer, tokenizer_json
from tinyllm.gguf_base import base_of_gguf

TURNS = (
    "{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' + m.content + '<end_of_turn>' }}"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>{% endif %}"
)
PROBES = [*TEXTS, " a", "<start_of_turn>user\n a  b<end_of_turn> c", "龘", ""]


def replaced(prefix: bool):
    from tokenizers import normalizers

    steps = [normalizers.Prepend("▁")] if prefix else []
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def metaspace(scheme: str, split: bool = False):
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=split)


def described(**changes) -> dict:
    """The content of a tokenizer.json, with changes to its model."""
    content = json.loads(spaced_tokenizer().backend_tokenizer.to_str())
    content["model"] |= changes
    return content


def test_scores_follow_the_merges():
    vocab, merges = vocabulary()
    order = merge_order(described())
    first = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
    assert sorted(order, key=order.get) == sorted(first, key=first.get)
    assert order.keys() < vocab.keys() and sorted(order.values()) == list(range(len(order)))


def test_what_llama_cpp_would_merge_otherwise_is_refused():
    vocab, merges = vocabulary()
    made = [left + right for left, right in merges]
    split_up = next(i for i in range(1, len(made)) if made[i] == made[i - 1])
    moved = [*merges[:split_up], *merges[split_up + 1 :], merges[split_up]]
    no_byte = {token: index for token, index in vocab.items() if token != "<0x0A>"}
    for changes, reason in (
        ({"merges": merges[:split_up] + merges[split_up + 1 :]}, "no merge makes"),
        ({"merges": moved}, "come before and after others"),
        ({"vocab": no_byte}, "no token for the byte <0x0A>"),
        ({"vocab": vocab | {"abc龘": SIZE, "abc": SIZE + 1}}, "no merge makes"),
        ({"ignore_merges": True}, "whole words"),
    ):
        with pytest.raises(UserError, match=f"SentencePiece-like.*{reason}") as error:
            merge_order(described(**changes))
        assert "\n" not in str(error.value)
    merge_order(described(merges=[" ".join(pair) for pair in merges]))  # as before tokenizers 0.20


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "template", "prefix"),
    [
        (replaced(True), None, None, True),
        (replaced(False), None, None, False),
        (None, metaspace("never"), None, False),
        (None, metaspace("always"), TURNS, True),
        (None, metaspace("first"), TURNS, False),  # its prompts begin with a marker
    ],
)
def test_where_spaces_are_put(normalizer, pre_tokenizer, template, prefix):
    tokenizer = spaced_tokenizer(normalizer, pre_tokenizer, template)
    chat_format_of(tokenizer)
    assert space_prefix(tokenizer, tokenizer_json(tokenizer)) is prefix


def test_other_ways_to_prepare_text_are_refused():
    from tokenizers import normalizers, pre_tokenizers

    for normalizer, pre_tokenizer, reason in (
        (None, metaspace("first"), "where it puts a space"),  # before "<|user|>", not after "</s>"
        (None, metaspace("always", split=True), "prepares text by Metaspace"),
        (normalizers.NFKC(), metaspace("never"), "prepares text by NFKC, Metaspace"),
        (replaced(False), pre_tokenizers.Whitespace(), "Sequence|Replace, Whitespace"),
        (None, None, "prepares text by nothing"),
    ):
        tokenizer = spaced_tokenizer(normalizer, pre_tokenizer)
        chat_format_of(tokenizer)
        with pytest.raises(UserError, match=reason) as error:
            check_tokenizer(tokenizer)
        assert "\n" not in str(error.value)


def test_a_marker_that_takes_the_spaces_beside_it_is_refused():
    from tokenizers import AddedToken

    tokenizer = spaced_tokenizer(replaced(False), None, TURNS)
    check_tokenizer(tokenizer)
    tokenizer.add_tokens([AddedToken("<think>", rstrip=True, normalized=False)])
    with pytest.raises(UserError, match="its marker '<think>' looks at the text beside it"):
        check_tokenizer(tokenizer)


def test_a_vocabulary_without_merges_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    with pytest.raises(UserError, match=r"only BPE tokenizers .* this one is Unigram"):
        check_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<unk>"))
    backend = Tokenizer(models.BPE({"a": 0}, []))  # over characters, without bytes
    with pytest.raises(UserError, match="only BPE tokenizers over bytes"):
        check_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="a"))


def test_runs_of_spaces_are_normal_tokens():
    """llama.cpp writes a user-defined token as it stands: signs for spaces would be seen."""
    assert token_type("▁▁", USER_DEFINED, "<unk>", {"▁▁": 0}) == NORMAL
    assert token_type("\n\n", USER_DEFINED, "<unk>", {"\n\n": 0}) == USER_DEFINED
    assert token_type("<unk>", 3, "<unk>", {}) == UNKNOWN


@pytest.mark.parametrize("prefix", [True, False])
def test_a_file_with_its_rule_for_spaces_is_a_base_again(tmp_path, prefix):
    """transformers alone would put a space before the very first stretch, whatever the file says."""
    pytest.importorskip("gguf")
    from tinyllm.export.gguf import write_gguf

    model, tokenizer = make_model(vocab_size=SIZE), spaced_tokenizer(replaced(prefix), None, TURNS)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    base = base_of_gguf(tmp_path / "m.gguf", print, tmp_path / "ckpt")
    again, read = load_base(base, torch.float32)
    for text in PROBES:
        expected = tokenizer(text, add_special_tokens=False)
        assert read(text, add_special_tokens=False).input_ids == expected.input_ids, text
        ids = expected.input_ids
        assert read.decode(ids).strip() == tokenizer.decode(ids).strip()
    ids = torch.arange(262, 302)[None]
    with torch.no_grad():
        found, original = again(input_ids=ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(found, original, atol=1e-4, rtol=1e-4)
