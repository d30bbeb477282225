"""GGUF of Gemma 3 and of SentencePiece-like tokenizers: read back by transformers and, where it is
installed, by llama.cpp; what they would take for something else is refused."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import TEXTS, make_model
from gemma_parts import (
    MARKERS,
    SIZE,
    gemma_model,
    gemma_tokenizer,
    spaced_tokenizer,
)

import load_lora_model as program
from load_lora_model import load_lora_model, load_lora_model_without_merge
from tinyllm.base import load_base
from tinyllm.certificate import compare
from tinyllm.chat_format import chat_format_of
from tinyllm.errors import UserError
from tinyllm.gguf_base import base_of_gguf

gguf = pytest.importorskip("gguf")
IDS = torch.arange(262, 302)[None]  # 40 ids, five times the window
PROBES = [
    *TEXTS, "你好，世界！ 123 abc\n", "<start_of_turn>user\n你好 <end_of_turn>\n", " a", "a  b   c ",
    "龘 ☀️", "\n\n", "the cat and  the hat", " ",
    *(f"a{' ' * n}b{chr(10) * n}" for n in range(2, 21)),
]  # fmt: skip
TURNS = (
    "{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' + m.content + '<end_of_turn>' }}"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>{% endif %}"
)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits[0]


def ids_of(tokenizer, texts=PROBES):
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def export(base, adapter, target, *more):
    words = ["--base_model", str(base), "--output_dir", str(target), *more]
    return program.main(words + (["--lora_model", str(adapter)] if adapter else []))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A base folder, and the folder of a LoRA on it that changes what it says."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("gemma")
    gemma_model().save_pretrained(folder / "base")
    gemma_tokenizer().save_pretrained(folder / "base")
    model, _ = load_base(folder / "base", torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    torch.manual_seed(1)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn_like(parameter)
    lora.save_pretrained(folder / "lora")
    return folder / "base", folder / "lora"


@pytest.mark.parametrize(("kind", "kl"), [("f32", 1e-7), ("f16", 1e-4), ("q8_0", 5e-3)])
def test_gemma_is_read_back(gemma, tmp_path, kind, kl):
    from tinyllm.export.gguf import read_gguf

    export(*gemma, tmp_path / "out", "--export", "gguf", "--gguf_type", kind)
    merged, _ = load_lora_model(*map(str, gemma), device="cpu")
    alone, _ = load_base(gemma[0], torch.float32)
    assert compare(logits(merged), logits(alone)).mean_kl > 10 * kl  # the adapter does something
    found = logits(read_gguf(tmp_path / "out", f"out-{kind}.gguf"))
    assert compare(logits(merged), found).mean_kl <= kl
    certificate = json.loads((tmp_path / "out" / "merge_certificate.json").read_text())
    assert certificate["comparisons"]["reloaded"]["mean_kl"] <= kl


def test_what_stands_in_the_file(tmp_path):
    from tinyllm.export.gguf import write_gguf

    model, tokenizer = gemma_model(), gemma_tokenizer()
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "gemma3"
    assert fields["gemma3.attention.sliding_window"] == 8
    assert fields["gemma3.attention.sliding_window_pattern"] == 6
    assert fields["gemma3.attention.key_length"] == 256
    assert (fields["gemma3.rope.freq_base"], fields["gemma3.rope.freq_base_swa"]) == (1e6, 1e4)
    told = {n.removeprefix("tokenizer.ggml."): v for n, v in fields.items() if "tokenizer" in n}
    assert told["model"] == "llama" and "merges" not in told
    assert told["add_bos_token"] is True and told["add_space_prefix"] is False
    names = ("bos_token_id", "eos_token_id", "eot_token_id", "unknown_token_id", "padding_token_id")
    assert [told[name] for name in names] == [2, 1, 5, 3, 0]
    assert told["token_type"][:7] == [3, 3, 3, 2, 3, 3, 6] and told["token_type"][262] == 1
    made = [score for score in told["scores"] if score > -1e6]
    assert len(made) > 100 and made == sorted(made, reverse=True)
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    layer = model.model.layers[5]
    for place, norm in (
        ("attn_norm", layer.input_layernorm), ("attn_q_norm", layer.self_attn.q_norm),
        ("post_attention_norm", layer.post_attention_layernorm),
        ("ffn_norm", layer.pre_feedforward_layernorm),
        ("post_ffw_norm", layer.post_feedforward_layernorm),
    ):  # fmt: skip
        assert torch.equal(tensors[f"blk.5.{place}.weight"], norm.weight + 1)
    assert torch.equal(tensors["token_embd.weight"], model.model.embed_tokens.weight)
    assert "output.weight" not in tensors


def test_an_untied_gemma_is_read_back(tmp_path):
    from tinyllm.export.gguf import read_gguf, write_gguf

    model = gemma_model(tie_word_embeddings=False)
    write_gguf(model, gemma_tokenizer(), tmp_path / "m.gguf", "f32")
    torch.testing.assert_close(logits(read_gguf(tmp_path, "m.gguf")), logits(model))


def test_a_gemma_file_is_a_base_again(gemma, tmp_path):
    """Weights that bfloat16 has come back bit for bit, and text has the same ids."""
    export(gemma[0], None, tmp_path / "out", "--export", "gguf", "--gguf_type", "f32")
    lines = []
    base = base_of_gguf(tmp_path / "out" / "out-f32.gguf", lines.append, tmp_path / "ckpt")
    again, tokenizer = load_base(base, torch.float32)
    model, original = load_base(gemma[0], torch.float32)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-4, rtol=1e-4)
    assert ids_of(tokenizer) == ids_of(original)
    assert tokenizer("a").input_ids[0] == original("a").input_ids[0] == 2
    turns = [{"role": "user", "content": "你好  a"}]
    prompts = [chat_format_of(t).encode_prompt(turns) for t in (tokenizer, original)]
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 64}, "head_dim 64"),
        ({"query_pre_attn_scalar": 168}, "query_pre_attn_scalar 168"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({"layer_types": ["full_attention"] * 7}, r"full attention in layers \[0, 1, 2"),
        ({"hidden_activation": "silu"}, "hidden_activation silu"),
    ],
)
def test_another_gemma_is_refused(tmp_path, changes, reason):
    from tinyllm.export.gguf import write_gguf

    with pytest.raises(UserError, match=f"this Gemma 3 cannot be written: {reason}") as error:
        write_gguf(gemma_model(**changes), gemma_tokenizer(), tmp_path / "m.gguf")
    assert "\n" not in str(error.value) and not (tmp_path / "m.gguf").exists()


def test_scaled_positions_of_gemma_are_refused(tmp_path):
    from tinyllm.export.gguf import write_gguf

    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    with pytest.raises(UserError, match="position scaling linear"):
        write_gguf(gemma_model(rope_parameters=ropes), gemma_tokenizer(), tmp_path / "m.gguf")
    ropes["full_attention"] = {"rope_type": "default", "rope_theta": 1e6}
    ropes["sliding_attention"]["rope_theta"] = 5e4
    with pytest.raises(UserError, match=r"rope_theta of local layers 50000\.0"):
        write_gguf(gemma_model(rope_parameters=ropes), gemma_tokenizer(), tmp_path / "m.gguf")


def llama_cpp_of(path, **more):
    llama_cpp = pytest.importorskip("llama_cpp")
    options = {"n_ctx": 64, "logits_all": True, "verbose": False, "n_threads": 1}
    return llama_cpp.Llama(str(path), **options, **more)


@pytest.mark.slow
def test_llama_cpp_reads_gemma(gemma, tmp_path):
    """Ids, logits beyond the window, the end of a turn, and the adapter applied to the base."""
    import numpy as np

    pytest.importorskip("llama_cpp")
    for target, adapter, kind in (("both", gemma[1], "gguf"), ("base", None, "gguf"),
                                  ("lora", gemma[1], "gguf_lora")):  # fmt: skip
        more = () if kind == "gguf_lora" else ("--gguf_type", "f32")
        export(gemma[0], adapter, tmp_path / target, "--export", kind, *more)
    beside, tokenizer = load_lora_model_without_merge(*map(str, gemma), "cpu")
    both = llama_cpp_of(tmp_path / "both" / "both-f32.gguf")
    for text, expected in zip(PROBES, ids_of(tokenizer), strict=True):
        assert both.tokenize(text.encode(), add_bos=False, special=True) == expected, text
    assert both.tokenize(b"a")[0] == 2 and both._model.token_eot() == 5
    assert both.detokenize(ids_of(tokenizer, ["你好  a   b"])[0]).decode() == "你好  a   b"
    lora = str(tmp_path / "lora" / "lora-lora.gguf")
    for model in (both, llama_cpp_of(tmp_path / "base" / "base-f32.gguf", lora_path=lora)):
        model.eval(IDS[0].tolist())
        found = torch.tensor(np.array(model.scores[: IDS.shape[1]]))
        assert compare(logits(beside), found).mean_kl < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp_writes_spaces_as_the_tokenizer(tmp_path, prefix):
    from tinyllm.export.gguf import write_gguf

    tokenizer = spaced(prefix)
    write_gguf(make_model(vocab_size=SIZE), tokenizer, tmp_path / "m.gguf", "f32")
    model = llama_cpp_of(tmp_path / "m.gguf")
    for text, expected in zip(PROBES, ids_of(tokenizer), strict=True):
        assert model.tokenize(text.encode(), add_bos=False, special=True) == expected, text


def spaced(prefix: bool):
    from tokenizers import normalizers

    steps = [normalizers.Prepend("▁")] if prefix else []
    replace = normalizers.Replace(" ", "▁")
    return spaced_tokenizer(normalizers.Sequence([*steps, replace]), None, TURNS)


def test_marker_tokens_without_a_row_are_left_out(tmp_path):
    """Gemma's tokenizer knows a marker for images, which its text models have no row for."""
    from tinyllm.export.gguf_tokenizer import token_list

    tokenizer = gemma_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*MARKERS[4:], "<image>"]})
    size = tokenizer.convert_tokens_to_ids("<image>")
    assert "<image>" not in token_list(tokenizer, size)[0]
    with pytest.raises(UserError, match="beyond the embedding"):
        token_list(tokenizer, size - 1)
