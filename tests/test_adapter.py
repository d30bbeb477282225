"""Adapter folders: what is loaded equals what was trained, and what is wrong is said."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, make_model, make_tokenizer

import load_lora_model as program
from load_lora_model import load_lora_model, load_lora_model_without_merge
from tinyllm.adapter import BIN, SAFETENSORS, read_adapter
from tinyllm.chat_format import chat_format_of
from tinyllm.errors import UserError

IDS = torch.arange(5, 45)[None]


@pytest.fixture
def adapter(finished_run, tmp_path):
    """A copy of a trained adapter that a test may damage."""
    return shutil.copytree(finished_run, tmp_path / "adapter")


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_merged_equals_unmerged_and_differs_from_the_base(base_folder, finished_run):
    merged, tokenizer = load_lora_model(str(base_folder), str(finished_run), device="cpu")
    beside, _ = load_lora_model_without_merge(str(base_folder), str(finished_run), device="cpu")
    torch.testing.assert_close(logits(merged), logits(beside), atol=1e-5, rtol=1e-5)
    with beside.disable_adapter():
        assert not torch.allclose(logits(merged), logits(beside), atol=1e-3)
    assert type(merged).__name__ == "LlamaForCausalLM" and not merged.training
    assert tokenizer.chat_template == chat_format_of(make_tokenizer()).text.tokenizer.chat_template


def test_both_weight_files_hold_the_same_and_each_suffices(base_folder, finished_run, adapter):
    both = read_adapter(adapter)
    expected = logits(load_lora_model(str(base_folder), str(adapter), device="cpu")[0])
    (adapter / SAFETENSORS).rename(adapter / "aside")
    only_bin = read_adapter(adapter)
    assert only_bin.weights_file == BIN and both.weights_file == SAFETENSORS
    assert all(torch.equal(both.weights[k], only_bin.weights[k]) for k in both.weights)
    torch.testing.assert_close(
        logits(load_lora_model(str(base_folder), str(adapter), device="cpu")[0]), expected
    )


def test_trainable_only_when_asked(base_folder, finished_run):
    frozen, _ = load_lora_model_without_merge(str(base_folder), str(finished_run), "cpu")
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training
    model, _ = load_lora_model_without_merge(
        str(base_folder), str(finished_run), "cpu", is_trainable=True
    )
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained) and model.training


def test_plain_peft_loads_it(base_folder, finished_run):
    """The guide's section 3.3, with the test's folders and no code of ours."""
    code = f"""
import torch
from transformers import AutoTokenizer, AutoModelForCausalLM
from peft import PeftModel
base_model = AutoModelForCausalLM.from_pretrained({str(base_folder)!r}, torch_dtype=torch.bfloat16,
    device_map="auto", trust_remote_code=True)
model = PeftModel.from_pretrained(base_model, {str(finished_run)!r}, torch_dtype=torch.bfloat16,
    device_map="auto")
model = model.merge_and_unload()
tokenizer = AutoTokenizer.from_pretrained({str(base_folder)!r}, trust_remote_code=True)
ids = tokenizer("你好", return_tensors="pt").input_ids
print(model.generate(ids, max_new_tokens=4).shape[0])
import sys; assert "tinyllm" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 and done.stdout.strip() == "1", done.stderr


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def only_bin(folder, content: bytes):
    (folder / SAFETENSORS).unlink()
    (folder / BIN).write_bytes(content)


DAMAGES = {
    "no weights": (lambda f: [(f / n).unlink() for n in (SAFETENSORS, BIN)], "no weights; expected"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
    "broken config": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
    "cut safetensors": (lambda f: cut(f / SAFETENSORS), "damaged or cut short"),
    "empty bin": (lambda f: only_bin(f, b""), "damaged or cut short"),
    "cut bin": (lambda f: ((f / SAFETENSORS).unlink(), cut(f / BIN)), "damaged or cut short"),
    "evil pickle": (lambda f: only_bin(f, pickle.dumps(Evil())), "refused, it holds more than tensors"),
    "no dictionary": (lambda f: only_bin(f, pickle.dumps([1])), "refused|expected tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders_are_one_clear_line(base_folder, adapter, name):
    damage, message = DAMAGES[name]
    damage(adapter)
    with pytest.raises(UserError, match=message) as caught:
        load_lora_model(str(base_folder), str(adapter), device="cpu")
    assert "\n" not in str(caught.value) and str(adapter) in str(caught.value)


def test_an_evil_torch_file_is_never_executed(base_folder, adapter):
    (adapter / SAFETENSORS).unlink()
    torch.save({"x": Evil()}, adapter / BIN)
    with pytest.raises(UserError, match="refused"):
        read_adapter(adapter)


@pytest.mark.parametrize(
    "change", [{"hidden_size": 64}, {"num_hidden_layers": 1}, {"intermediate_size": 48}]
)
def test_another_base_is_refused_by_name(tmp_path, finished_run, change):
    make_model(**change).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"made for another base: its? .*layers\."):
        load_lora_model(str(tmp_path / "other"), str(finished_run), device="cpu")


def test_missing_tensors_are_named(base_folder, adapter):
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / SAFETENSORS)
    gone = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != gone}, adapter / SAFETENSORS)
    with pytest.raises(UserError, match=f"1 of .* tensors are missing, first {gone}"):
        load_lora_model(str(base_folder), str(adapter), device="cpu")


@pytest.mark.parametrize(
    ("path", "message"), [("nowhere", "no such base folder"), ("empty", "no config.json")]
)
def test_bad_base_folders(tmp_path, finished_run, path, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        load_lora_model(str(tmp_path / path), str(finished_run), device="cpu")


def test_a_base_without_tokenizer_or_weights(tmp_path, finished_run):
    make_model().save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="no tokenizer"):
        load_lora_model(str(tmp_path / "base"), str(finished_run), device="cpu")
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        load_lora_model(str(tmp_path / "base"), str(finished_run), device="cpu")


def test_adapter_given_as_base_is_explained(finished_run, adapter):
    with pytest.raises(UserError, match="this is an adapter"):
        load_lora_model(str(adapter), str(finished_run), device="cpu")


def test_the_program_describes_and_merges(base_folder, finished_run, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    assert program.main(["--lora_model", str(finished_run)]) == 0
    shown = capsys.readouterr().out
    assert "10 golden conversations" in shown
    assert "r 4, alpha 32" in shown and "q_proj" in shown and str(base_folder) in shown
    target = tmp_path / "merged"
    words = ["--base_model", str(base_folder), "--lora_model", str(finished_run)]
    assert program.main([*words, "--output_dir", str(target)]) == 0
    alone = AutoModelForCausalLM.from_pretrained(target)
    beside, _ = load_lora_model_without_merge(str(base_folder), str(finished_run), "cpu")
    torch.testing.assert_close(logits(alone), logits(beside), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="not empty"):
        program.main([*words, "--output_dir", str(target)])
    assert not list(tmp_path.glob(".merged*"))


def change(adapter, how):
    """Rewrite an adapter's tensors: ``how`` takes and gives them by name."""
    from safetensors.torch import load_file, save_file

    save_file(how(load_file(adapter / SAFETENSORS)), adapter / SAFETENSORS)


def test_an_adapter_without_effect_stops_unless_forced(base_folder, adapter, capsys):
    change(adapter, lambda w: {k: v * 0 if "lora_B" in k else v for k, v in w.items()})
    program.main(["--lora_model", str(adapter)])
    assert "no effect" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"changes nothing, all 14 .*down_proj.lora_B.weight"):
        load_lora_model(str(base_folder), str(adapter), device="cpu")
    forced, _ = load_lora_model(str(base_folder), str(adapter), device="cpu", force=True)
    assert "going on, as forced" in capsys.readouterr().err
    torch.testing.assert_close(logits(forced), logits(make_model()))


def test_whole_layers_trained_along_are_an_effect(adapter):
    change(adapter, lambda w: {k: v * 0 if "lora_B" in k else v for k, v in w.items()})
    assert not read_adapter(adapter).has_effect
    change(adapter, lambda w: w | {"base_model.model.lm_head.weight": torch.ones(480, 32)})
    assert read_adapter(adapter).has_effect


def test_tensors_that_would_be_ignored_are_named(base_folder, adapter, capsys):
    """peft loads such a file without a word."""
    extra = "base_model.model.model.layers.0.self_attn.qkv_proj.weight"
    change(adapter, lambda w: w | {extra: torch.ones(4, 4)})
    with pytest.raises(UserError, match=f"1 tensors belong to nothing .* ignored: {extra}"):
        load_lora_model(str(base_folder), str(adapter), device="cpu")
    load_lora_model(str(base_folder), str(adapter), device="cpu", force=True)


def test_nan_in_an_adapter_is_named(base_folder, adapter):
    change(adapter, lambda w: {k: v * float("nan") if "k_proj" in k else v for k, v in w.items()})
    with pytest.raises(UserError, match=r"4 tensors hold NaN or infinity, first .*k_proj"):
        load_lora_model(str(base_folder), str(adapter), device="cpu", force=True)


def test_a_wrong_rank_is_refused(base_folder, adapter):
    change(adapter, lambda w: {k: v[:2] if "q_proj.lora_A" in k else v for k, v in w.items()})
    with pytest.raises(UserError, match=r"peft cannot load it: .*size mismatch"):
        load_lora_model(str(base_folder), str(adapter), device="cpu")


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_plain_peft_load(base_folder, tmp_path, capsys):
    """With a trained output layer and an adapted embedding, as other tools write them."""
    from peft import LoraConfig, get_peft_model

    for number, more in enumerate(
        ({"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]})
    ):
        options = {"r": 2, "target_modules": ["q_proj"]} | more
        lora = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        torch.manual_seed(0)
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        lora.save_pretrained(tmp_path / str(number))
        loaded, _ = load_lora_model_without_merge(
            str(base_folder), str(tmp_path / str(number)), "cpu"
        )
        assert torch.equal(logits(loaded), logits(lora))
        assert "carries no fingerprint" in capsys.readouterr().err


def test_importing_the_programs_does_nothing():
    """Imports are quick and silent: torch is loaded when a function needs it."""
    code = "import load_lora_model, inference_lora, sft_lora, sys; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.stdout.strip() == "False" and not done.stderr


def test_config_is_json_with_sorted_targets(finished_run):
    config = json.loads((finished_run / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["base_model_name_or_path"]
