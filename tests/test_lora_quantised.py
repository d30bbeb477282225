"""Bases in 4 and 8 bits: what is refused always, and training where bitsandbytes is installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from conftest import train_arguments

from tinyllm import qlora
from tinyllm.errors import UserError
from tinyllm.settings import BaseSettings, LoraSettings

FLAGS = ["load_in_4bit", "load_in_8bit"]


@pytest.mark.parametrize("flag", FLAGS)
def test_what_cannot_work_is_refused(flag, monkeypatch):
    base = BaseSettings(**{flag: True})
    with pytest.raises(UserError, match="needs --use_lora True"):
        qlora.check_quantisation(base, LoraSettings(use_lora=False))
    with pytest.raises(UserError, match="choose one of the two"):
        qlora.check_quantisation(base, LoraSettings(init_lora_weights="pissa"))
    monkeypatch.setattr(qlora, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"requirement-quant\.txt"):
        qlora.check_quantisation(base, LoraSettings())
    qlora.check_quantisation(BaseSettings(), LoraSettings())


def test_both_at_once_are_refused():
    with pytest.raises(UserError, match="choose one"):
        BaseSettings(load_in_4bit=True, load_in_8bit=True)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("flag", FLAGS)
def test_trained_saved_and_loaded(tmp_path, base_folder, flag):
    """The same logits beside the same quantised base, and a usable adapter for the base itself."""
    from tinyllm.adapter import attach_adapter, read_adapter
    from tinyllm.base import load_base
    from tinyllm.fast_lora import FastLoraLinear
    from tinyllm.finish import write_adapter
    from tinyllm.lora import add_lora
    from tinyllm.qlora import prepare_quantised, quantisation_config

    ids = torch.randint(5, 470, (2, 13), generator=torch.Generator().manual_seed(3))
    config = quantisation_config(BaseSettings(**{flag: True}), torch.float32)

    def quantised():
        return prepare_quantised(load_base(base_folder, quantisation=config)[0])

    torch.manual_seed(0)
    lora = add_lora(quantised(), LoraSettings(lora_r=4, lora_alpha=8, lora_dropout=0.0)).train()
    assert not any(isinstance(module, FastLoraLinear) for module in lora.modules())
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = lora(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    write_adapter(lora.eval(), tmp_path)
    with torch.no_grad():
        trained = lora(input_ids=ids).logits
        again = attach_adapter(quantised(), read_adapter(tmp_path)).eval()(input_ids=ids).logits
        torch.testing.assert_close(again, trained, atol=1e-4, rtol=1e-3)
        whole = attach_adapter(load_base(base_folder)[0], read_adapter(tmp_path)).eval()
        loss = whole(input_ids=ids, labels=ids).loss
    assert loss < losses[0]


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_run_in_4_bits(tmp_path, base_folder, data_file):
    import sft_lora
    from load_lora_model import load_lora_model

    words = train_arguments(
        base_folder, data_file, tmp_path / "run", "--load_in_4bit", "True", "--save_strategy", "no"
    )
    assert sft_lora.main(words) == 0
    load_lora_model(str(base_folder), str(tmp_path / "run"), device="cpu")
