"""The fast LoRA layer against peft's own."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model

from tinyllm import lora_by_torch, lora_linears
from tinyllm.dropout import Dropout, mask
from tinyllm.fast_lora import FastLoraLinear, use_fast_lora

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora_model(fast: bool, dropout: float = 0.0, dtype=torch.float32, **config):
    peft_config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=dropout, target_modules=TARGETS,
        **config,
    )  # fmt: skip
    if fast:
        use_fast_lora(peft_config)
    base = make_model(attention_bias=True).to(dtype)
    torch.manual_seed(1)
    model = get_peft_model(base, peft_config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize(
    ("dtype", "native"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
)
def test_loss_and_gradients_equal_pefts(monkeypatch, dtype, native):
    monkeypatch.setattr(lora_by_torch, "cpu_multiplies_bf16", lambda: native)
    if not native:
        monkeypatch.setattr(lora_linears.compiled, "takes", lambda *tensors: False)
    ids = torch.randint(5, 480, (2, 17))
    slow, fast = lora_model(False, dtype=dtype), lora_model(True, dtype=dtype)
    assert sum(isinstance(m, FastLoraLinear) for m in fast.modules()) == 14
    losses = [loss_of(m, ids) for m in (slow, fast)]
    for loss in losses:
        loss.backward()
    tolerance = (
        {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 5e-2}
    )
    torch.testing.assert_close(losses[0], losses[1], **tolerance)
    for (name, a), (_, b) in zip(slow.named_parameters(), fast.named_parameters(), strict=True):
        if a.requires_grad:
            assert a.dtype == b.dtype == torch.float32
            torch.testing.assert_close(
                a.grad, b.grad, msg=lambda m, n=name: f"{n}: {m}", **tolerance
            )


def dropout_mask(shape: torch.Size, p: float) -> torch.Tensor:
    drawn = Dropout(p)
    return mask(shape, drawn.seed, drawn.threshold)


def test_dropout_is_one_independent_mask_for_each_element():
    torch.manual_seed(0)
    drawn = dropout_mask(torch.Size((1000, 1000)), 0.1)
    assert drawn.dtype == torch.uint8 and set(drawn.unique().tolist()) == {0, 1}
    kept = drawn.double()
    assert abs(kept.mean().item() - 0.9) < 1e-3
    # rows, columns, and the four lanes of one draw do not follow each other
    assert (kept.mean(0) - 0.9).abs().max() < 0.06 and (kept.mean(1) - 0.9).abs().max() < 0.06
    flat = kept.flatten() - 0.9
    for step in (1, 2, 3, 4, 1000):
        assert abs((flat[step:] * flat[:-step]).mean().item()) / 0.09 < 4e-3
    assert not torch.equal(
        dropout_mask(torch.Size((9, 9)), 0.5), dropout_mask(torch.Size((9, 9)), 0.5)
    )


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_rate(p):
    torch.manual_seed(0)
    assert abs(dropout_mask(torch.Size((1003, 997)), p).double().mean().item() - (1 - p)) < 2e-3


def test_dropout_keeps_the_expected_output():
    """Averaged over many masks the layer gives what it gives without dropout."""
    torch.manual_seed(0)
    model = lora_model(True, dropout=0.3)
    layer = next(m for m in model.modules() if isinstance(m, FastLoraLinear))
    x = torch.randn(1, 4, 32)
    mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    layer.eval()
    torch.testing.assert_close(mean, layer(x), atol=0.02, rtol=0.05)


def test_dropout_follows_the_generator():
    model, ids = lora_model(True, dropout=0.3), torch.randint(5, 480, (1, 9))
    state = torch.get_rng_state()
    first = loss_of(model, ids)
    torch.set_rng_state(state)
    assert torch.equal(first, loss_of(model, ids))
    assert not torch.equal(first, loss_of(model, ids))


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}])
def test_other_variants_give_pefts_result(variant):
    ids = torch.randint(5, 480, (1, 9))
    slow, fast = lora_model(False, **variant), lora_model(True, **variant)
    torch.testing.assert_close(loss_of(slow, ids), loss_of(fast, ids))


def test_disabled_merged_and_evaluated_layers_are_pefts():
    ids = torch.randint(5, 480, (1, 9))
    slow, fast = lora_model(False).eval(), lora_model(True).eval()
    torch.testing.assert_close(loss_of(slow, ids), loss_of(fast, ids))
    fast.train()
    with slow.disable_adapter(), fast.disable_adapter():
        torch.testing.assert_close(loss_of(slow, ids), loss_of(fast, ids))
    with_adapter = loss_of(slow, ids)
    merged = fast.eval().merge_and_unload()
    torch.testing.assert_close(with_adapter, loss_of(merged, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_at_all(dtype):
    """What a head with LoRA gets where a rank has nothing to learn."""
    layer = next(m for m in lora_model(True, dtype=dtype).modules() if type(m) is FastLoraLinear)
    x = torch.zeros(1, 0, 32, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.shape == (1, 0, 32)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(not p.grad.any() for p in layer.parameters() if p.requires_grad)


def test_outputs_may_be_changed_in_place():
    """As OLMo does with its queries, keys and values."""
    layer = next(m for m in lora_model(True).modules() if type(m) is FastLoraLinear)
    x = torch.randn(1, 4, 32)
    expected = layer(x).clamp(-0.1, 0.1)
    found = layer(x).clamp_(-0.1, 0.1)
    found.sum().backward()
    assert torch.equal(found, expected)


def test_under_autocast_pefts_own_forward_is_taken():
    ids, model = torch.randint(5, 480, (2, 9)), lora_model(True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, ids)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
