"""Packed examples attend as if each were alone, forward and backward."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model

from tinyllm.attention import PACKED_SDPA, lay_out, use_packed_attention
from tinyllm.batches import model_inputs

LENGTHS = [3, 40, 1, 70, 33, 5, 64]


def packed_batch(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 480, (sum(lengths),), generator=generator)
    return {"input_ids": ids, "labels": ids, "lengths": torch.tensor(lengths)}


def logits_one_by_one(model, batch):
    parts = batch["input_ids"].split(batch["lengths"].tolist())
    return torch.cat([model(input_ids=part[None]).logits[0] for part in parts])


@pytest.mark.parametrize("lengths", [LENGTHS, [7], [1, 1, 1], [64, 64]])
def test_packed_logits_equal_each_alone(lengths):
    model, batch = make_model(), packed_batch(lengths)
    alone = logits_one_by_one(model, batch)
    assert use_packed_attention(model)
    packed = model(**model_inputs(batch, packed_attention=True)).logits[0]
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_packed_gradients_equal_each_alone():
    first, second, batch = make_model(), make_model(), packed_batch()
    weights = torch.randn(sum(LENGTHS), 480)
    (logits_one_by_one(first, batch) * weights).sum().backward()
    use_packed_attention(second)
    (second(**model_inputs(batch, True)).logits[0] * weights).sum().backward()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=2e-4, rtol=1e-4)


def test_transformers_own_packed_mask_agrees():
    model, batch = make_model(), packed_batch()
    plain = model(**model_inputs(batch, packed_attention=False)).logits[0]
    torch.testing.assert_close(plain, logits_one_by_one(model, batch), atol=1e-5, rtol=1e-5)


def test_a_sliding_window_is_kept():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=480, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, use_sliding_window=True,
            sliding_window=8, max_window_layers=0,
        )
    ).eval()  # fmt: skip
    batch = packed_batch()
    alone = logits_one_by_one(model, batch)
    assert use_packed_attention(model)
    packed = model(**model_inputs(batch, True)).logits[0]
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_generation_still_works():
    model = make_model()
    ids = torch.randint(5, 480, (1, 9))
    before = model.generate(ids, max_new_tokens=8, do_sample=False)
    use_packed_attention(model)
    assert model.config._attn_implementation == PACKED_SDPA
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), before)


def test_layout_moves_there_and_back():
    layout = lay_out(torch.tensor([0, 3, 43, 44, 114]))
    assert torch.equal(layout.source[layout.place], torch.arange(114))
    assert len(layout.groups) == 3
    assert len(layout.padding) + 114 == len(layout.source)


def test_eager_models_are_left_alone():
    model = make_model()
    model.set_attn_implementation("eager")
    assert not use_packed_attention(model)
