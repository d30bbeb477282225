"""The loss under a frozen head, a few positions at a time, against PyTorch's over all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config, Qwen3Config

from tinyllm import head_loss
from tinyllm.head_loss import FrozenHeadLoss, frozen_head_loss, has_plain_frozen_head

SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def other_families():
    torch.manual_seed(0)
    configs = [Qwen2Config(**SHAPE), Qwen3Config(**SHAPE), MistralConfig(**SHAPE)]
    return [make_model(), *map(AutoModelForCausalLM.from_config, configs)]


@pytest.fixture(params=["head", "exponentials", "nothing"])
def compiled(request, monkeypatch):
    """The whole loss compiled, where there is a compiler for it, only its exponentials, nothing."""
    if request.param != "head":
        monkeypatch.setattr(head_loss.compiled, "takes", lambda *tensors: False)
    if request.param == "nothing":
        monkeypatch.setattr(head_loss.pointwise, "takes", lambda *tensors: False)


@pytest.mark.parametrize("chunk", [1, 700, 1 << 21])
def test_loss_and_gradient_equal_pytorchs(monkeypatch, compiled, chunk):
    monkeypatch.setitem(head_loss.CHUNK_ELEMENTS, "cpu", chunk)
    torch.manual_seed(0)
    hidden = torch.randn(23, 16, requires_grad=True)
    weight, ids = torch.randn(300, 16), torch.randint(0, 300, (23,))
    expected = F.cross_entropy(hidden @ weight.t(), ids, reduction="sum")
    (gradient,) = torch.autograd.grad(3 * expected, hidden)
    loss = FrozenHeadLoss.apply(hidden, weight, ids)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, hidden)[0], gradient)


@pytest.mark.parametrize("size", [1, 32, 45])
def test_filled_rows_count_for_nothing(compiled, size):
    torch.manual_seed(0)
    hidden = torch.randn(size, 16).bfloat16().requires_grad_()
    weight, ids = torch.randn(300, 16).bfloat16(), torch.randint(0, 300, (size,))
    expected = F.cross_entropy(hidden.float() @ weight.float().t(), ids, reduction="sum")
    (gradient,) = torch.autograd.grad(expected, hidden)
    loss = FrozenHeadLoss.apply(hidden, weight, ids)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    found = torch.autograd.grad(loss, hidden)[0]
    torch.testing.assert_close(found, gradient, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_label_that_is_no_word_is_an_error(dtype):
    hidden, weight = torch.randn(2, 8, dtype=dtype), torch.randn(5, 8, dtype=dtype)
    for ids in ([0, 5], [-1, 0]):
        with pytest.raises((IndexError, RuntimeError)):
            FrozenHeadLoss.apply(hidden, weight, torch.tensor(ids))


def test_chunks_fit_the_rows_that_they_are_filled_up_to(monkeypatch):
    monkeypatch.setattr(head_loss.compiled, "takes", lambda *tensors: False)
    for words in (1003, 49_152, 128_256, 1 << 24):
        half = torch.empty(words, 0, dtype=torch.bfloat16)
        rows = head_loss.chunk_rows(half)
        assert rows % 32 == 0 and rows > 0
        assert head_loss.chunk_rows(half.float()) == max(1, (1 << 23) // words)
        assert head_loss.chunk_bytes(half, 3) >= 32 * words * 2


def test_huge_logits_stay_finite(compiled):
    hidden = torch.full((2, 4), 1e4, requires_grad=True)
    weight = torch.eye(4)[:3]
    loss = FrozenHeadLoss.apply(hidden, weight, torch.tensor([0, 2]))
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.t(), torch.tensor([0, 2]), reduction="sum"))  # fmt: skip
    assert torch.isfinite(torch.autograd.grad(loss, hidden)[0]).all()


def test_every_plain_family_equals_its_whole_forward():
    ids = torch.randint(5, 300, (1, 19))
    positions, following = torch.arange(3, 18), ids[0, 4:19]
    for model in other_families():
        model.requires_grad_(False)
        assert has_plain_frozen_head(model), model.config.model_type
        whole = F.cross_entropy(model(input_ids=ids).logits[0, 3:18], following, reduction="sum")
        loss = frozen_head_loss(model, {"input_ids": ids, "use_cache": False}, positions, following)
        torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-5)


def test_what_is_not_plain_or_not_frozen_is_refused():
    model = make_model()
    assert not has_plain_frozen_head(model)  # its head is trained
    model.requires_grad_(False)
    model.config.model_type = "granite"  # scales its logits
    assert not has_plain_frozen_head(model)
