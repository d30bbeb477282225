"""GGUF: what is written reads back, by transformers always and by llama.cpp where it is installed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import make_model, make_tokenizer
from transformers import GenerationConfig

import load_lora_model as program
from load_lora_model import load_lora_model, load_lora_model_without_merge
from tinyllm.certificate import compare
from tinyllm.chat_format import CHAT_TEMPLATE, chat_format_of
from tinyllm.errors import UserError
from tinyllm.export.gguf_tokenizer import QWEN2_SPLIT, split_name, without_generation_tags
from tinyllm.export.ollama import modelfile

gguf = pytest.importorskip("gguf")
IDS = torch.arange(5, 45)[None]
TEXTS = [
    "你好，世界！ 123 abc\n",
    "<|user|>\n你好\n<|assistant|>\n",
    "It's 12.5%,  don't\n\n  end ",
    "龘 ☀️",
]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits[0]


def export(base, adapter, target, *more):
    words = ["--base_model", str(base), "--output_dir", str(target), *more]
    return program.main(words + (["--lora_model", str(adapter)] if adapter else []))


def read(path):
    """Logits, token strings and metadata, as independent readers see them."""
    from tinyllm.export.gguf import read_gguf

    fields = gguf.GGUFReader(path).fields
    return logits(read_gguf(path.parent, path.name)), {k: f.contents() for k, f in fields.items()}


@pytest.mark.parametrize(("kind", "kl"), [("f32", 1e-7), ("f16", 1e-5), ("q8_0", 1e-2)])
def test_transformers_reads_it_back(base_folder, finished_run, tmp_path, kind, kl):
    from transformers import AutoTokenizer

    export(base_folder, finished_run, tmp_path / "out", "--export", "gguf", "--gguf_type", kind)
    merged, tokenizer = load_lora_model(str(base_folder), str(finished_run), device="cpu")
    found, fields = read(tmp_path / "out" / f"out-{kind}.gguf")
    assert compare(logits(merged), found).mean_kl <= kl
    if kind == "f32":
        torch.testing.assert_close(found, logits(merged), atol=1e-4, rtol=1e-4)
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    unused = fields["tokenizer.ggml.token_type"][len(tokenizer) :]
    assert len(tokens) == 480 and set(unused) == {5}
    assert [fields["tokenizer.ggml.token_type"][i] for i in (0, 4, 5)] == [3, 3, 1]
    assert fields["tokenizer.ggml.eos_token_id"] == 1 and fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.add_bos_token"] is False
    from_gguf = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=f"out-{kind}.gguf")
    for text in TEXTS:
        expected = tokenizer(text, add_special_tokens=False).input_ids
        assert from_gguf(text, add_special_tokens=False).input_ids == expected
    certificate = json.loads((tmp_path / "out" / "merge_certificate.json").read_text())
    assert certificate["comparisons"]["reloaded"]["mean_kl"] <= kl


def qwen(kind):
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    make, config = {
        "qwen2": (Qwen2ForCausalLM, Qwen2Config),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    }[kind]
    model = make(config(
        vocab_size=480, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim={"qwen2": 8, "qwen3": 128}[kind],
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.2, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


MODELS = {
    "qwen2": lambda: qwen("qwen2"),
    "qwen3": lambda: qwen("qwen3"),
    "untied llama, all heads, more rows than tokens": lambda: make_model(
        vocab_size=500, tie_word_embeddings=False, num_key_value_heads=4, rope_theta=50000.0
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_layouts(name, tmp_path):
    from tinyllm.export.gguf import read_gguf, write_gguf

    model, tokenizer = MODELS[name](), make_tokenizer()
    chat_format_of(tokenizer)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    again = read_gguf(tmp_path, "m.gguf")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-4, rtol=1e-4)


def test_a_base_alone_and_a_merged_folder_can_be_exported(base_folder, finished_run, tmp_path):
    export(base_folder, finished_run, tmp_path / "merged")
    export(tmp_path / "merged", None, tmp_path / "out", "--export", "gguf", "--gguf_type", "f32")
    merged, _ = load_lora_model(str(base_folder), str(finished_run), device="cpu")
    found, _ = read(tmp_path / "out" / "out-f32.gguf")
    torch.testing.assert_close(found, logits(merged), atol=1e-4, rtol=1e-4)


def test_what_has_no_place_in_gguf_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from tinyllm.export.gguf import write_gguf

    tokenizer = make_tokenizer()
    chat_format_of(tokenizer)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=480, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(UserError, match="type gpt2 cannot be written, only llama, qwen2, qwen3"):
        write_gguf(gpt2, tokenizer, tmp_path / "m.gguf")
    scaled = make_model(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(UserError, match="position scaling linear"):
        write_gguf(scaled, tokenizer, tmp_path / "m.gguf")
    huge = make_model()
    huge.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    with pytest.raises(UserError, match="beyond float16"):
        write_gguf(huge, tokenizer, tmp_path / "m.gguf")
    small = make_model(vocab_size=100)
    with pytest.raises(UserError, match="beyond the embedding"):
        write_gguf(small, tokenizer, tmp_path / "m.gguf")


def step(kind, **options):
    return {"type": kind, **options}


BYTES = step("ByteLevel", add_prefix_space=False, use_regex=True)
ONLY = step("ByteLevel", add_prefix_space=False, use_regex=False)


def described(*steps, **more):
    pre = {"type": "Sequence", "pretokenizers": list(steps)}
    return {"pre_tokenizer": pre, "normalizer": None, "model": {}} | more


def test_ways_of_splitting_have_llama_cpps_names():
    split = step("Split", pattern={"Regex": QWEN2_SPLIT}, behavior="Isolated", invert=False)
    assert split_name(described(BYTES)) == "gpt-2"
    assert split_name(described(step("Digits", individual_digits=True), BYTES)) == "smollm"
    assert split_name(described(split, ONLY, normalizer={"type": "NFC"})) == "qwen2"
    for wrong in (
        described(step("Digits", individual_digits=False), BYTES),
        described(split, BYTES),
        described(BYTES, normalizer={"type": "Lowercase"}),
        described(BYTES, model={"ignore_merges": True}),
    ):
        with pytest.raises(UserError, match="GGUF"):
            split_name(wrong)


def test_the_template_in_the_file_renders_the_same():
    import jinja2

    assert "generation %}" not in without_generation_tags(CHAT_TEMPLATE)
    chat_format = chat_format_of(make_tokenizer())
    template = jinja2.Template(without_generation_tags(CHAT_TEMPLATE))
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "你好"},
                {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]  # fmt: skip
    rendered = template.render(
        messages=messages, eos_token="<|endoftext|>", add_generation_prompt=True
    )
    assert rendered == chat_format.render(messages, add_generation_prompt=True)
    trimmed = "a {%- generation -%} b {%- endgeneration -%} c"
    assert without_generation_tags(trimmed) == "a {%- if true -%} b {%- endif -%} c"


def render_go(template: str, messages: list[dict]) -> str:
    """The few constructs of Go's text/template that our Modelfile uses."""
    import re

    text = re.sub(r"\s*\{\{-", "{{", template)
    parts = re.fullmatch(
        r"\{\{ range \.Messages \}\}\{\{ if eq \.Role \"assistant\" \}\}(.*?)\{\{ else \}\}(.*?)"
        r"\{\{ end \}\}\{\{ end \}\}(.*)", text, re.DOTALL,
    )  # fmt: skip
    answer, other, tail = parts.groups()
    turns = [
        (answer if m["role"] == "assistant" else other)
        .replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"])
        for m in messages
    ]  # fmt: skip
    return "".join(turns) + tail


def test_the_modelfile_speaks_the_training_format(base_folder, finished_run, tmp_path):
    export(base_folder, finished_run, tmp_path / "out", "--export", "ollama")
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert (
        text.startswith("FROM ./out-f16.gguf\n") and (tmp_path / "out" / "out-f16.gguf").is_file()
    )
    assert 'SYSTEM """你是由李小贱开发的个人助手。"""' in text
    for stop in ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"):
        assert f'PARAMETER stop "{stop}"' in text
    template = text.split('TEMPLATE """')[1].split('"""')[0]
    chat_format = chat_format_of(make_tokenizer())
    for turns in (["user"], ["system", "user"], ["system", "user", "assistant", "user"]):
        messages = [{"role": role, "content": f"{role} 你好"} for role in turns]
        assert render_go(template, messages) == chat_format.render(messages, True)


def test_a_template_of_the_base_has_no_modelfile():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(UserError, match="brings its own chat template"):
        modelfile("m.gguf", tokenizer, None, GenerationConfig())


def test_the_modelfile_chooses_words_as_the_base_does():
    """Ollama's own defaults sample, and penalize the words of the question."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    greedy = modelfile("m.gguf", tokenizer, None, GenerationConfig(do_sample=False))
    assert "PARAMETER repeat_penalty 1.0\nPARAMETER temperature 0\n" in greedy
    config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.2)
    lines = modelfile("m.gguf", tokenizer, None, config).splitlines()
    for line in (
        "repeat_penalty 1.2",
        "repeat_last_n -1",
        "temperature 0.7",
        "top_k 50",
        "top_p 0.9",
        "min_p 0.0",
    ):
        assert f"PARAMETER {line}" in lines


def test_an_adapter_as_gguf_is_the_same_update(base_folder, finished_run, tmp_path):
    """Base weight + alpha / r B A, from the two GGUF files, is the merged weight."""
    export(base_folder, finished_run, tmp_path / "lora", "--export", "gguf_lora")
    export(base_folder, None, tmp_path / "base", "--export", "gguf", "--gguf_type", "f32")
    export(base_folder, finished_run, tmp_path / "both", "--export", "gguf", "--gguf_type", "f32")
    lora, base, both = (
        gguf.GGUFReader(next((tmp_path / name).glob("*.gguf"))) for name in ("lora", "base", "both")
    )
    assert lora.fields["general.type"].contents() == "adapter"
    alpha = lora.fields["adapter.lora.alpha"].contents()
    half = {t.name: torch.tensor(t.data) for t in lora.tensors}
    start, merged = ({t.name: torch.tensor(t.data) for t in r.tensors} for r in (base, both))
    adapted = [name for name in start if f"{name}.lora_a" in half]
    assert len(adapted) == 14 == len(half) / 2
    for name in adapted:
        a, b = half[f"{name}.lora_a"], half[f"{name}.lora_b"]
        expected = start[name] + alpha / a.shape[0] * (b @ a)
        torch.testing.assert_close(merged[name], expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_is_no_plain_lora_has_no_gguf(base_folder, finished_run, tmp_path):
    folder = shutil.copytree(finished_run, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": {"q_proj": 8}}))
    with pytest.raises(UserError, match="layers with other scales"):
        export(base_folder, folder, tmp_path / "out", "--export", "gguf_lora")
    with pytest.raises(UserError, match="needs --lora_model"):
        export(base_folder, None, tmp_path / "out", "--export", "gguf_lora")
    assert not (tmp_path / "out").exists()


def test_a_wrong_file_is_not_published(base_folder, finished_run, tmp_path, monkeypatch):
    """As when the rows of the projections are left in the order of transformers."""
    monkeypatch.setattr("tinyllm.export.gguf.reorder_heads", lambda name, rows, *_: rows)
    with pytest.raises(UserError, match="nothing was written: the reloaded model"):
        export(base_folder, finished_run, tmp_path / "out", "--export", "gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_llama_cpp_reads_it_back(base_folder, finished_run, tmp_path):
    """Tokens, logits, and the adapter applied to the base; skipped without llama-cpp-python."""
    llama_cpp = pytest.importorskip("llama_cpp")
    import numpy as np

    for target, adapter, kind in (("both", finished_run, "gguf"), ("base", None, "gguf"),
                                  ("lora", finished_run, "gguf_lora")):  # fmt: skip
        more = () if kind == "gguf_lora" else ("--gguf_type", "f32")
        export(base_folder, adapter, tmp_path / target, "--export", kind, *more)
    beside, tokenizer = load_lora_model_without_merge(str(base_folder), str(finished_run), "cpu")
    options = {"n_ctx": 64, "logits_all": True, "verbose": False, "n_threads": 1}
    both = llama_cpp.Llama(str(tmp_path / "both" / "both-f32.gguf"), **options)
    for text in TEXTS:
        expected = tokenizer(text, add_special_tokens=False).input_ids
        assert both.tokenize(text.encode(), add_bos=False, special=True) == expected
    apart = llama_cpp.Llama(
        str(tmp_path / "base" / "base-f32.gguf"),
        lora_path=str(tmp_path / "lora" / "lora-lora.gguf"), **options,
    )  # fmt: skip
    for model in (both, apart):
        model.eval(IDS[0].tolist())
        found = torch.tensor(np.array(model.scores[: IDS.shape[1]]))
        assert compare(logits(beside), found).mean_kl < 1e-4
