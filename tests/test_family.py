"""tiny-llm-zh folders: logits, text and ids equal to the family's own code, which never runs."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, ROWS, train_arguments, write_jsonl
from family import FIXTURES, ORACLE, add_code, family_folder, forward, random_folder
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tinyllm.base import load_base
from tinyllm.chat_format import CHAT_TEMPLATE, IGNORE_INDEX, chat_format_of
from tinyllm.errors import UserError
from tinyllm.family.sentencepiece_model import Piece, SentencePieceModel
from tinyllm.family.tokenizer import vocabulary_of

STRINGS = ORACLE["strings"]
IDS_OF = {string["text"]: string["auto"]["ids"] for string in STRINGS}
QUESTION = [
    {"role": "system", "content": "你是由李小贱开发的个人助手。"},
    {"role": "user", "content": "你好"},
]
ANSWER = {"role": "assistant", "content": "你好，我是李小贱的助手。"}
EOS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as a later save leaves it: tokenizer, ``auto_map`` and code files."""
    return add_code(family_folder(tmp_path_factory.mktemp("family") / "sft"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=["small/bin", "v_tied/bin", "v_tied/safetensors"])
def case(request):
    """``(model, what the family's own code gives)`` for each fixture."""
    expected = np.load(FIXTURES / request.param.split("/")[0] / "expected.npz")
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / request.param, dtype=torch.float32)
    return model, {name: torch.tensor(expected[name]) for name in expected}


@torch.no_grad()
def test_logits_and_loss_are_the_family_s_own(case):
    model, expected = case
    ids, mask = expected["input_ids"], expected["attention_mask"]
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    labels[1, 11] = IGNORE_INDEX  # foreseen from a pad token, whose logits are not comparable
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    compared = mask[:, expected["logit_positions"]].bool()
    logits = output.logits[:, expected["logit_positions"]]
    assert (logits - expected["logits"])[compared].abs().max() <= 1e-5
    assert abs(output.loss.item() - expected["loss"].item()) <= 1e-5
    tail = model(input_ids=expected["long_ids"]).logits[:, -4:]
    # Logits of 10 after hundreds of tokens: processors that sum in another order differ in the last bits.
    assert (tail - expected["long_logits_tail"]).abs().max() <= 2e-5


def test_greedy_text_is_the_family_s_own(case):
    model, expected = case
    ids, mask = expected["input_ids"], expected["attention_mask"]
    greedy = {"max_new_tokens": 32, "do_sample": False}
    both = model.generate(input_ids=ids, attention_mask=mask, **greedy)
    assert torch.equal(both, expected["greedy_batch"])
    assert torch.equal(model.generate(input_ids=ids[:1], **greedy), expected["greedy_row0"])
    alone = model.generate(input_ids=ids[1:, 11:], **greedy)
    assert torch.equal(alone, expected["greedy_row1_unpadded"])


@pytest.mark.parametrize(
    "shape",
    [
        {},  # no num_key_value_heads: as many as there are query heads
        {
            "hidden_size": 120,
            "intermediate_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
        },
        {"num_key_value_heads": 2, "rope_theta": 500.0, "rms_norm_eps": 1e-2},
        {"num_key_value_heads": 1, "tie": True},
        {"dtype": torch.float16},
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    ],
)
def test_every_shape_is_what_its_config_says(tmp_path, shape):
    config, weights = random_folder(tmp_path / "base", **shape)
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "base").dtype
        == weights["lm_head.weight"].dtype
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    ids = torch.arange(5, 53)
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0]
    expected = forward(config, weights, ids)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_token_ids_are_added_and_code_files_forgotten(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.eos_token_id, config.pad_token_id) == ("tinyllm", EOS, 0)
    model, tokenizer = load_base(folder)
    generation = model.generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (EOS, 0)
    model.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (EOS, 0, 0)


@pytest.mark.parametrize("trust", [None, False, True])
def test_code_in_a_folder_never_runs(folder, trust):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    assert type(model).__module__ == "tinyllm.family.model"
    assert type(tokenizer) is PreTrainedTokenizerFast and tokenizer("你好").input_ids[-1] == 442


@pytest.mark.parametrize("mode", ["auto", "direct"])
def test_ids_are_the_family_s_own_in_both_modes(folder, tmp_path, mode):
    built = AutoTokenizer.from_pretrained(folder, direct=mode == "direct")
    built.save_pretrained(tmp_path)
    for tokenizer in (built, AutoTokenizer.from_pretrained(tmp_path)):
        for string in STRINGS:
            text, expected = string["text"], string[mode]
            assert tokenizer(text, add_special_tokens=False).input_ids == expected["ids"], text
            assert tokenizer(text).input_ids == expected["ids_special"], text
            if not set(expected["ids"]) & set(tokenizer.get_added_vocab().values()):
                assert tokenizer.decode(expected["ids"]) == expected["decode"]


def test_the_vocabulary_is_the_family_s_own(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == ORACLE["vocab_size"]
    named = {n: i for n, i in ORACLE["ids"].items() if n not in ("<bos>", "<eos>", "<pad>")}
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in named} == named
    assert tokenizer.chat_template == CHAT_TEMPLATE and tokenizer.padding_side == "left"
    assert set(tokenizer("你好")) == {"input_ids", "attention_mask"}


def test_tokenizer_model_alone_is_enough(tmp_path, tokenizer):
    folder = family_folder(tmp_path / "base")
    (folder / "tokenizer_config.json").unlink()
    alone = AutoTokenizer.from_pretrained(folder)
    assert all(alone(s["text"]).input_ids == s["auto"]["ids_special"] for s in STRINGS)
    assert alone.padding_side == "left"


def test_a_template_of_the_user_s_own_stays(tmp_path):
    folder = family_folder(tmp_path / "base")
    (folder / "chat_template.jinja").write_text("mine")
    assert AutoTokenizer.from_pretrained(folder).chat_template == "mine"


def test_a_raw_folder_without_tokenizer_says_what_to_copy(tmp_path):
    folder = family_folder(tmp_path / "base", tokenizer=False)
    for load in (AutoTokenizer.from_pretrained, load_base):
        with pytest.raises(
            UserError, match=r"tokenizer\.model and tokenizer_config\.json"
        ) as caught:
            load(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES = {
    "cut short": (cut, "damaged, or no SentencePiece model"),
    "text": (lambda path: path.write_text("hello world\n"), "no SentencePiece model|expected"),
    "empty": (lambda path: path.write_bytes(b""), "without pieces"),
    "other spaces": (
        lambda path: path.write_bytes(path.read_bytes() + b"\x1a\x02\x20\x01"), "expected spaces kept",
    ),
    "unigram": (lambda path: path.write_bytes(path.read_bytes() + b"\x12\x02\x18\x01"), "expected model type BPE"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_another_tokenizer_model_is_refused(tmp_path, name):
    damage, message = DAMAGES[name]
    folder = family_folder(tmp_path / "base")
    damage(folder / "tokenizer.model")
    with pytest.raises(UserError, match=message) as caught:
        AutoTokenizer.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_files_of_two_tokenizers_are_refused(tmp_path):
    folder = family_folder(tmp_path / "base")
    text = (folder / "tokenizer_config.json").read_text().replace('"1006"', '"64795"')
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(UserError, match=r"<\|user\|> the id 64795, but .* it is 1006"):
        AutoTokenizer.from_pretrained(folder)


def test_an_extra_token_hides_a_piece_of_the_same_text():
    pieces = [Piece("<unk>", kind=2), Piece("sop", -1.0), Piece("a", -2.0)]
    vocabulary = vocabulary_of(SentencePieceModel(pieces), {}, FIXTURES)
    assert (vocabulary["a"], vocabulary["[MASK]"], vocabulary["sop"]) == (2, 3, 6)


@pytest.mark.parametrize("order", ["import tinyllm; {auto}", "{auto}; import tinyllm"])
def test_importing_the_package_registers_in_any_order(folder, order):
    code = f"""
{order.format(auto="from transformers import AutoModelForCausalLM, AutoTokenizer")}
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
print(type(model).__name__, AutoTokenizer.from_pretrained({str(folder)!r})("你好").input_ids)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.stdout.strip() == "TinyllmForCausalLM [1001, 1003, 442]", done.stderr


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = "import tinyllm, sys; print({'torch', 'transformers', 'tokenizers'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.stdout.strip() == "set()", done.stderr


def test_prompt_and_training_ids_are_the_whole_string_s(tokenizer):
    chat = chat_format_of(tokenizer)
    prompt, encoded = chat.encode_prompt(QUESTION), chat.encode([*QUESTION, ANSWER])
    assert prompt == IDS_OF[chat.render(QUESTION, add_generation_prompt=True)]
    assert encoded.input_ids == [*IDS_OF[chat.render([*QUESTION, ANSWER])[: -len("</s>")]], EOS]
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.labels == [IGNORE_INDEX] * len(prompt) + encoded.input_ids[len(prompt) :]


def test_each_exchange_of_a_long_conversation_is_one_string(tokenizer):
    chat = chat_format_of(tokenizer)
    messages = [*QUESTION, ANSWER, {"role": "user", "content": "谢谢"}, ANSWER]
    parts = chat.render(messages).split("</s>")[:-1]
    whole = [
        i for part in parts for i in [*tokenizer(part, add_special_tokens=False).input_ids, EOS]
    ]
    assert chat.encode(messages).input_ids == whole
    assert chat.encode(messages).input_ids[
        : len(chat.encode_prompt(messages[:-1]))
    ] == chat.encode_prompt(messages[:-1])


def test_special_tokens_typed_by_anyone_stay_text(tokenizer):
    """In "philosophy", too: the family's own tokenizer would cut out its token ``sop``."""
    chat, nasty = chat_format_of(tokenizer), "a philosopher [gMASK]<|user|>\n</s><|assistant|>"
    messages = [{"role": role, "content": nasty} for role in ("system", "user", "assistant")]
    encoded = chat.encode(messages)
    special = set(tokenizer.get_added_vocab().values())
    found = tokenizer.convert_ids_to_tokens([i for i in encoded.input_ids if i in special])
    assert found == ["<|user|>", "<|assistant|>", "</s>"]
    plain = tokenizer.decode(
        [i for i, s in zip(encoded.input_ids, encoded.supervised, strict=True) if s]
    )
    assert plain == f"{nasty}</s>"
    prompt = chat.encode_prompt(messages[:2])
    assert encoded.input_ids[: len(prompt)] == prompt


def test_train_load_merge_and_chat(folder, tmp_path):
    import sft_lora
    from load_lora_model import load_lora_model, load_lora_model_without_merge
    from tinyllm.generate import generate_reply

    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    words = train_arguments(folder, rows, tmp_path / "run", "--num_train_epochs", "60",
                            "--learning_rate", "2e-2", "--lora_r", "8", "--lora_dropout", "0", "--eval_strategy", "no",
                            "--save_strategy", "no", "--num_sample_replies", "0")  # fmt: skip
    assert sft_lora.main(words) == 0
    model, tokenizer = load_lora_model(str(folder), str(tmp_path / "run"), "cpu")
    beside, _ = load_lora_model_without_merge(str(folder), str(tmp_path / "run"), "cpu")
    chat = chat_format_of(tokenizer)
    ids = torch.tensor([chat.encode([*QUESTION, ANSWER]).input_ids])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, beside(ids).logits, atol=1e-4, rtol=1e-4)
    reply = generate_reply(model, tokenizer, chat, QUESTION, max_new_tokens=30, do_sample=False)
    assert reply.stopped and reply.text == ROWS[0]["answer"]
