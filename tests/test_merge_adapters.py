"""Several adapters on one base: each state says exactly what that adapter says alone."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file

from load_lora_model import load_lora_adapters, load_lora_model_without_merge
from tinyllm.adapter import SAFETENSORS
from tinyllm.errors import UserError

IDS = torch.arange(5, 45)[None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def folders(finished_run, tmp_path_factory):
    """The trained adapter, and another with the same tokenizer and other weights."""
    other = tmp_path_factory.mktemp("adapters") / "other"
    shutil.copytree(finished_run, other, ignore=shutil.ignore_patterns("checkpoint-*", "*.bin"))
    weights = load_file(other / SAFETENSORS)
    torch.manual_seed(3)
    save_file({k: v + 0.05 * torch.randn_like(v) for k, v in weights.items()}, other / SAFETENSORS)
    return {"first": finished_run, "second": other}


@pytest.fixture(scope="module")
def alone(base_folder, folders):
    """Logits of each adapter loaded alone, and of the base."""
    models = {
        name: load_lora_model_without_merge(str(base_folder), str(path), "cpu")[0]
        for name, path in folders.items()
    }
    found = {name: logits(model) for name, model in models.items()}
    with models["first"].disable_adapter():
        found["base"] = logits(models["first"])
    return found


@pytest.fixture
def model(base_folder, folders):
    model, tokenizer = load_lora_adapters(str(base_folder), folders, device="cpu")
    assert len(tokenizer) == len(make_tokenizer())
    return model


def test_switching_is_exact(model, alone):
    assert not torch.allclose(alone["first"], alone["second"])
    assert torch.equal(logits(model), alone["first"])
    for name in ("second", "first", "second"):
        model.set_adapter(name)
        assert torch.equal(logits(model), alone[name])
        with model.disable_adapter():
            assert torch.equal(logits(model), alone["base"])
    assert torch.equal(logits(model), alone["second"])


def test_unloading_leaves_the_others_exact(model, alone):
    model.delete_adapter("first")
    assert list(model.peft_config) == ["second"]
    model.set_adapter("second")
    assert torch.equal(logits(model), alone["second"])
    assert torch.equal(logits(model.unload()), alone["base"])


def test_weighted_combinations(model, alone):
    model.add_weighted_adapter(["first", "second"], [1.0, 0.0], "only", combination_type="cat")
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "mixed", combination_type="cat")
    model.set_adapter("only")
    torch.testing.assert_close(logits(model), alone["first"], atol=1e-5, rtol=1e-5)
    model.set_adapter("mixed")
    torch.testing.assert_close(logits(model), by_hand(model), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(model), alone["first"], atol=1e-3)
    model.set_adapter("first")
    assert torch.equal(logits(model), alone["first"])


def by_hand(model):
    """Logits of the base with half of both adapters' products in its weights."""
    plain = make_model()
    layers = dict(plain.named_modules())
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight"):
            delta = layer.get_delta_weight("first") + layer.get_delta_weight("second")
            layers[name].weight.data += delta.detach() / 2
    return logits(plain)


def test_what_does_not_fit_together_is_refused(base_folder, folders, tmp_path):
    with pytest.raises(UserError, match="no adapters given"):
        load_lora_adapters(str(base_folder), {})
    with pytest.raises(UserError, match=r"adapter name 'a\.b'"):
        load_lora_adapters(str(base_folder), {"a.b": folders["first"]})
    with pytest.raises(UserError, match="adapter name 'half'"):
        load_lora_adapters(str(base_folder), {"half": folders["first"]})
    other = shutil.copytree(folders["second"], tmp_path / "other")
    (other / "base_fingerprint.json").unlink()
    make_tokenizer(["quite other words 三四五六"]).save_pretrained(other)
    with pytest.raises(UserError, match="first and other were trained with other"):
        load_lora_adapters(str(base_folder), {"first": folders["first"], "other": other})
