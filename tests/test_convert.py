"""The standard folder opens without this package and gives the same ids, logits and text."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from family import FIXTURES, ORACLE, add_code, family_folder, random_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyllm import convert as module
from tinyllm.chat_format import chat_format_of
from tinyllm.convert import convert
from tinyllm.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return add_code(family_folder(tmp_path_factory.mktemp("convert") / "source"))


@pytest.fixture(scope="module")
def standard(source):
    assert convert(source, source.parent / "standard") <= 1e-5
    return source.parent / "standard"


def test_plain_transformers_opens_it_with_equal_ids_and_logits(standard, tmp_path):
    """In a process of its own, far from this repository."""
    code = f"""
import json, sys
import numpy as np, torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, raw = AutoTokenizer.from_pretrained({str(standard)!r}), Tokenizer.from_file({str(standard / "tokenizer.json")!r})
for string in json.load(open({str(FIXTURES / "tokenizer" / "oracle.json")!r}))["strings"]:
    text, expected = string["text"], string["auto"]
    assert tokenizer(text, add_special_tokens=False).input_ids == expected["ids"], text
    assert tokenizer(text).input_ids == raw.encode(text).ids == expected["ids_special"], text
expected = np.load({str(FIXTURES / "small" / "expected.npz")!r})
model = AutoModelForCausalLM.from_pretrained({str(standard)!r})
ids, mask = torch.tensor(expected["input_ids"]), torch.tensor(expected["attention_mask"])
with torch.no_grad():
    logits = model(input_ids=ids, attention_mask=mask).logits[:, expected["logit_positions"]]
difference = (logits - torch.tensor(expected["logits"]))[mask[:, expected["logit_positions"]].bool()]
assert difference.abs().max() <= 1e-5, difference.abs().max()
greedy = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=32, do_sample=False)
assert np.array_equal(greedy, expected["greedy_batch"])
assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 2
print(type(model).__name__, type(tokenizer).__name__, "tinyllm" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.split() == ["LlamaForCausalLM", "TokenizersBackend", "False"], done.stderr


def test_its_chat_template_gives_the_training_ids(source, standard):
    """Whole conversations too: the end token between two turns is one id."""
    own, written = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(standard)
    messages = [
        {"role": "system", "content": "你是由李小贱开发的个人助手。"},
        {"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"},
        {"role": "user", "content": "谢谢"}, {"role": "assistant", "content": "再见！"},
    ]  # fmt: skip
    ids = written.apply_chat_template(messages, return_dict=True).input_ids
    assert ids == chat_format_of(own).encode(messages).input_ids
    assert ids == chat_format_of(written).encode(messages).input_ids
    prompt = written.apply_chat_template(messages[:4], add_generation_prompt=True, return_dict=True)
    assert prompt.input_ids == chat_format_of(own).encode_prompt(messages[:4])


def test_what_the_folder_holds(source, standard):
    assert sorted(path.name for path in standard.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    ]  # fmt: skip
    config = json.loads((standard / "config.json").read_text())
    assert (config["model_type"], config["rope_theta"]) == ("llama", 10000.0)
    tokenizer = json.loads((standard / "tokenizer_config.json").read_text())
    assert (
        tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast" and not tokenizer["add_bos_token"]
    )
    listed = {int(i): token["content"] for i, token in tokenizer["added_tokens_decoder"].items()}
    assert listed[ORACLE["ids"]["<|user|>"]] == "<|user|>"
    assert [p.name for p in standard.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    "shape",
    [
        {"num_key_value_heads": 2, "rope_theta": 500.0, "rms_norm_eps": 1e-2},
        {"tie": True, "dtype": torch.float16},
    ],
)
def test_every_shape_converts(source, tmp_path, shape):
    _, weights = random_folder(tmp_path / "base", vocab_size=300, **shape)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / "base" / name).write_bytes((source / name).read_bytes())
    assert convert(tmp_path / "base", tmp_path / "standard") <= 1e-4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "standard")
    assert model.dtype == weights["lm_head.weight"].dtype
    assert model.config.tie_word_embeddings == shape.get("tie", False)


def test_what_cannot_be_converted_is_one_line(source, standard, tmp_path):
    for wrong, target, message in (
        (source, standard, "exists already"),
        (standard, tmp_path / "new", "a llama model, not a tiny-llm-zh one"),
        (tmp_path / "nowhere", tmp_path / "new", "no such base folder"),
        (family_folder(tmp_path / "raw", tokenizer=False), tmp_path / "new", "has no tokenizer"),
    ):
        with pytest.raises(UserError, match=message):
            convert(wrong, target)
    assert not (tmp_path / "new").exists()


def test_nothing_is_kept_when_the_result_differs(source, tmp_path, monkeypatch):
    monkeypatch.setattr(
        module, "KEPT_SETTINGS", tuple(n for n in module.KEPT_SETTINGS if n != "rope_parameters")
    )
    changed = family_folder(tmp_path / "base", rope_theta=500.0)
    with pytest.raises(UserError, match="logits differ"):
        convert(changed, tmp_path / "standard")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_the_program(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert", str(source), str(tmp_path / "standard")])
    assert module.main() == 0
    assert "same ids, logits within" in capsys.readouterr().out
    assert np.all([(tmp_path / "standard" / "config.json").is_file()])
