"""Merging: exact in float32, rounded once, certified, and refused where it would go wrong."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import load_lora_model as program
from load_lora_model import load_lora_model, load_lora_model_without_merge
from tinyllm.certificate import LIMITS, compare
from tinyllm.errors import UserError
from tinyllm.merge import merge
from tinyllm.run_folder import CERTIFICATE

IDS = torch.arange(5, 45)[None]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS.to(model.device)).logits


def lora_on(model, seed=1, **settings):
    """A LoRA with random B matrices."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ALL} | settings
    lora = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    torch.manual_seed(seed)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name or "magnitude" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    return lora


def reload(model, folder):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


KINDS = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "ranks of its own": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    "output layer of a tied base": {"target_modules": [*ALL, "lm_head"]},
    "embedding of a tied base": {"target_modules": [*ALL, "embed_tokens"]},
    "trained output layer of a tied base": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_reloaded_say_what_the_adapter_says(kind, tmp_path):
    lora = lora_on(make_model(), **KINDS[kind])
    if "modules_to_save" in KINDS[kind]:
        lora.get_output_embeddings().weight.data.add_(0.1 * torch.randn(480, 32))
    before = logits(lora)
    merged = merge(lora)
    torch.testing.assert_close(logits(merged), before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(reload(merged, tmp_path)), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_once_and_equal_to_itself_reloaded(dtype, tmp_path):
    """Also the rotary frequencies, which a plain ``model.to(dtype)`` would round."""
    exact = merge(lora_on(make_model()))
    rounded = merge(lora_on(make_model()), dtype)
    for (name, a), (_, b) in zip(exact.named_parameters(), rounded.named_parameters(), strict=True):
        assert torch.equal(a.to(dtype), b), name
    again = reload(rounded, tmp_path)
    assert again.dtype == dtype
    assert torch.equal(logits(rounded), logits(again))
    frequencies = rounded.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32


def test_quantised_weights_are_refused():
    lora = lora_on(make_model())
    layer = lora.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match=r"quantised .* merge into the full-precision base"):
        merge(lora)
    lora = lora_on(make_model())
    lora.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UserError, match=r"quantised \(gptq\)"):
        merge(lora)


def test_what_cannot_be_merged_is_said():
    prompt = get_peft_model(
        make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(UserError, match="PROMPT_TUNING cannot be merged"):
        merge(prompt)


def test_nan_is_refused():
    lora = lora_on(make_model())
    next(p for n, p in lora.named_parameters() if "lora_B" in n).data[0, 0] = float("nan")
    with pytest.raises(UserError, match="cannot be merged"):
        merge(lora)


def words(base, adapter, target, *more):
    return ["--base_model", str(base), "--lora_model", str(adapter), "--output_dir", str(target),
            *more]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_certificate_tells_what_was_measured(
    base_folder, finished_run, tmp_path, capsys, dtype
):
    target = tmp_path / "merged"
    assert program.main(words(base_folder, finished_run, target, "--torch_dtype", dtype)) == 0
    content = json.loads((target / CERTIFICATE).read_text())
    assert content["precision"] == dtype and content["base_is_the_recorded_one"] is True
    for name, precision in (("merged", "float32"), ("reloaded", dtype)):
        found = content["comparisons"][name]
        assert found["num_positions"] > 50
        assert found["max_logit_difference"] / found["logit_spread"] <= LIMITS[precision].logit
        assert found["mean_kl"] <= LIMITS[precision].kl
    card = (target / "README.md").read_text()
    reloaded = content["comparisons"]["reloaded"]
    assert f"| reloaded | {reloaded['max_logit_difference']:.2e}" in card
    assert "certificate  read back" in capsys.readouterr().out
    alone = AutoModelForCausalLM.from_pretrained(target)
    expected, _ = load_lora_model(str(base_folder), str(finished_run), "cpu", dtype)
    assert alone.dtype == getattr(torch, dtype) and torch.equal(logits(alone), logits(expected))


def test_a_bin_folder_holds_the_same(base_folder, finished_run, tmp_path):
    for kind in ("bin", "safetensors"):
        more = ("--save_format", kind, "--torch_dtype", "bfloat16")
        program.main(words(base_folder, finished_run, tmp_path / kind, *more))
    assert (tmp_path / "bin" / "pytorch_model.bin").is_file()
    assert not list((tmp_path / "bin").glob("*.safetensors"))
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / k) for k in ("bin", "safetensors")
    )
    assert first.dtype == second.dtype == torch.bfloat16
    assert torch.equal(logits(first), logits(second))
    assert first.generation_config.to_dict() == second.generation_config.to_dict()


def wrong_scale(lora, *args, **kwargs):
    for module in lora.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 0.9
    return merge(lora, *args, **kwargs)


def test_a_wrong_merge_writes_nothing(base_folder, finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr("tinyllm.export.source.merge", wrong_scale)
    with pytest.raises(UserError, match=r"nothing was written: the merged model .* logits differ"):
        program.main(words(base_folder, finished_run, tmp_path / "merged"))
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_written_as_it_was_writes_nothing(
    base_folder, finished_run, tmp_path, monkeypatch
):
    """The file on disk is what is certified, not the model in memory."""
    monkeypatch.setattr(
        "tinyllm.export.hf.save_merged",
        lambda model, tokenizer, folder, kind: (
            make_model(seed=3).save_pretrained(folder), tokenizer.save_pretrained(folder)
        ),
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"nothing was written: read back, .* is not what was merged"
    ):
        program.main(words(base_folder, finished_run, tmp_path / "merged"))
    assert list(tmp_path.iterdir()) == []


def test_comparing_by_hand():
    reference = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.5, 0.3]]))
    other = torch.log(torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.5, 0.3]]))
    found = compare(reference, other)
    assert found.greedy_agreement == 0.5 and found.num_positions == 2
    assert found.max_kl == pytest.approx(0.25 * 0.693147, rel=1e-4)
    assert found.mean_kl == pytest.approx(found.max_kl / 2)
    assert found.max_logit_difference == pytest.approx(0.693147, rel=1e-4)
    broken = compare(reference, other * float("nan"))
    assert len(broken.problems(LIMITS["bfloat16"])) >= 2


def test_force_merges_into_another_base_and_says_so(base_folder, finished_run, tmp_path, capsys):
    import shutil

    other = shutil.copytree(base_folder, tmp_path / "other")
    make_model(seed=5).save_pretrained(other)
    with pytest.raises(UserError, match="other weights"):
        program.main(words(other, finished_run, tmp_path / "merged"))
    program.main(words(other, finished_run, tmp_path / "merged", "--force"))
    assert "was forced" in (tmp_path / "merged" / "README.md").read_text()


def test_a_flag_that_would_be_ignored_is_refused(base_folder, finished_run, tmp_path):
    for more in (["--gguf_type", "f16"], ["--export", "gguf", "--torch_dtype", "bfloat16"]):
        with pytest.raises(UserError, match="means nothing with --export"):
            program.main(words(base_folder, finished_run, tmp_path / "out", *more))


def test_the_program_needs_an_adapter_or_a_base():
    for wrong in ([], ["--base_model", "x"], ["--output_dir", "x"]):
        with pytest.raises(UserError, match="--lora_model is missing"):
            program.main(wrong)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.filterwarnings("ignore")
def test_quantised_weights_stay_close_and_cannot_be_merged_into(
    base_folder, finished_run, kind, capfd, caplog
):
    pytest.importorskip("bitsandbytes")
    from tinyllm.quantize import quantize

    paths = (str(base_folder), str(finished_run))
    exact, _ = load_lora_model(*paths, device="cpu")
    for model in (
        load_lora_model(*paths, device="cpu", quantize=kind)[0],
        load_lora_model_without_merge(*paths, device="cpu", quantize=kind)[0],
    ):
        found = compare(logits(exact)[0], logits(model)[0])
        assert 0 < found.mean_kl < {"int8": 2e-3, "int4": 0.3}[kind]
    adapted = {n for n, _ in model.named_parameters() if "lora_" in n}
    assert adapted, "the adapter is still there"
    assert not caplog.records and "cast" not in capfd.readouterr().err
    with pytest.raises(UserError, match="quantised"):
        merge(model)
    with pytest.raises(UserError, match="quantised already"):
        quantize(model, kind)


def test_a_quantised_kind_that_is_none():
    from tinyllm.quantize import quantize

    with pytest.raises(UserError, match="expected one of int8, int4"):
        quantize(make_model(), "int3")
    with pytest.raises(UserError, match="no linear layers"):
        empty = SimpleNamespace(
            config=SimpleNamespace(), modules=lambda: [], named_modules=lambda: [],
            get_output_embeddings=lambda: None,
        )  # fmt: skip
        quantize(empty, "int8")
