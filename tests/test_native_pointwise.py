"""The compiled steps between products give what transformers' layers and NumPy give."""

from collections import Counter

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tinyllm import dropout
from tinyllm.attention import use_packed_attention
from tinyllm.batches import model_inputs
from tinyllm.decode.pages import Pages
from tinyllm.dropout import Dropout, mask
from tinyllm.fast_lora import use_fast_lora
from tinyllm.fused_layers import (
    FusedAttention,
    FusedLayer,
    FusedMlp,
    FusedNorm,
    join_projections,
    use_fused_layers,
)
from tinyllm.fused_model import FusedModel
from tinyllm.native import attention, head, lora, pointwise
from tinyllm.native.attention import PackedAttention
from tinyllm.native.pointwise import RmsNorm, SiluGate
from tinyllm.one_node import DecoderLayer, Step

TYPES = [torch.float32, torch.bfloat16]


def close_to(found, expected):
    """In bfloat16 to the last bit or, where sums were rounded in another order, one off."""
    exact = {"atol": 2e-6, "rtol": 2e-6}
    coarse = {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(
        found, expected, **(exact if found.dtype == torch.float32 else coarse)
    )
    if found.dtype == torch.bfloat16:
        assert (found == expected).double().mean() > 0.97


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [80, 120, 7])
def test_norm(processor, dtype, size):
    torch.manual_seed(0)
    norm = LlamaRMSNorm(size, eps=1e-5)
    norm.weight.data = torch.rand(size) + 0.5
    norm = norm.to(dtype).requires_grad_(False)
    x = (3 * torch.randn(2, 301, size)).to(dtype)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = norm(first), RmsNorm.apply(second, norm.weight, norm.variance_epsilon)
    close_to(found, expected)
    grad = torch.randn(2, 301, size).to(dtype)
    expected.backward(grad)
    found.backward(grad.transpose(0, 1).contiguous().transpose(0, 1))
    close_to(second.grad, first.grad)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [3, 500])
def test_gate(processor, dtype, rows):
    torch.manual_seed(0)
    gate, up, grad = ((4 * torch.randn(rows, 96)).to(dtype) for _ in range(3))
    gate[0, :6] = torch.tensor([0.0, -0.0, 60.0, -60.0, 1e4, -1e4]).to(dtype)
    inputs = [[t.clone().requires_grad_() for t in (gate, up)] for _ in range(2)]
    expected = torch.nn.functional.silu(inputs[0][0]) * inputs[0][1]
    found = SiluGate.apply(*inputs[1])
    close_to(found, expected)
    expected.backward(grad)
    found.backward(grad)
    for a, b in zip(inputs[1], inputs[0], strict=True):
        close_to(a.grad, b.grad)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("words", [5, 64, 1003])
def test_exponentials_and_cross_entropy(processor, dtype, words):
    torch.manual_seed(0)
    logits, ids = (5 * torch.randn(19, words)).to(dtype), torch.randint(0, words, (19,))
    logits[3] += 1000
    expected = torch.nn.functional.cross_entropy(logits.double(), ids, reduction="none")
    shares, found = logits.double().softmax(-1), logits.clone()
    losses, totals = pointwise.exponentiate(found, ids)
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=1e-5)
    close = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-4, "rtol": 4e-3}
    torch.testing.assert_close(found.double() / totals[:, None], shares, **close)
    logits[2, words - 1] = float("nan")
    assert pointwise.exponentiate(logits, ids)[0].isfinite().tolist() == [i != 2 for i in range(19)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 7, 400])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.99999])
def test_dropout_is_numpys(processor, dtype, rows, p):
    torch.manual_seed(0)
    x, y = torch.randn(rows, 51).to(dtype) + 3, torch.randn(rows, 51).to(dtype)
    drop = Dropout(p)
    kept = x * mask(x.shape, drop.seed, drop.threshold)
    assert torch.equal(drop.of(x), kept)
    assert torch.equal(added(drop, y, x), y + kept)


def added(drop, y, x):
    total = y.clone()
    drop.add(total, x.clone())
    return total


def test_however_many_are_drawn_at_a_time_they_are_the_same():
    torch.manual_seed(0)
    one_by_one = [Dropout(0.1).seed for _ in range(5)]
    torch.manual_seed(0)
    found = (
        dropout.dropouts([0.1, 0.0, 0.2]) + dropout.dropouts([0.1]) + dropout.dropouts([0.5, 0.5])
    )
    assert found[1] is None and [drop.seed for drop in found if drop] == one_by_one
    assert found[2].threshold == Dropout(0.2).threshold and len(set(one_by_one)) == 5


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [16, 20, 33])
def test_what_comes_past_a_norm_is_added_to_its_gradient(processor, dtype, size):
    torch.manual_seed(0)
    x, weight, grad, past = (torch.randn(n, size).to(dtype) for n in (300, 1, 300, 300))
    context = Step(RmsNorm, True)
    RmsNorm.forward(context, x, weight[0], 1e-5)
    alone = RmsNorm.backward(context, grad)[0]
    assert torch.equal(RmsNorm.backward(context, grad, past)[0], alone + past)


def test_without_a_compiler_the_same_is_dropped(monkeypatch):
    x, drop = torch.randn(40, 33), Dropout(0.3)
    expected = drop.of(x), added(drop, torch.ones(40, 33), x)
    monkeypatch.setattr(dropout.pointwise, "takes", lambda *tensors: False)
    assert torch.equal(drop.of(x), expected[0])
    assert torch.equal(added(drop, torch.ones(40, 33), x), expected[1])


def test_broken_numbers_stay_broken(processor):
    """A loss that is no number must not become one on the way."""
    for value in (float("nan"), float("inf")):
        x = torch.ones(2, 32, dtype=torch.bfloat16)
        x[1, 3] = value
        assert not RmsNorm.apply(x, x[0], 1e-5)[1].isfinite().all()
        assert not SiluGate.apply(x, x)[1, 3].isfinite()
        y = torch.zeros(2, 32, dtype=torch.bfloat16)
        pointwise.add_kept(y, x, 5, 0)
        assert not y[1, 3].isfinite()


def make(name: str):
    torch.manual_seed(0)
    if name == "llama":
        return make_model()
    config = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "mistral": MistralConfig}[name](
        vocab_size=480, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def used(monkeypatch):
    """How often each of the fast functions has been called."""
    calls = Counter()

    def spy(function):
        real = function.forward
        counted = staticmethod(lambda *of: calls.update([function.__name__]) or real(*of))
        monkeypatch.setattr(function, "forward", counted)

    for function in (RmsNorm, SiluGate, PackedAttention, DecoderLayer):
        spy(function)
    return calls


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_whole_models_have_the_same_loss_and_gradients(name, joins, dtype, used):
    if pointwise.library() is None:
        pytest.skip("no C compiler")
    models = []
    for fused in (False, True):
        base = make(name).to(dtype)
        assert use_packed_attention(base)
        if fused:
            number = use_fused_layers(base)
            kinds = FusedNorm | FusedMlp | FusedAttention | FusedLayer | FusedModel
            assert number == sum(isinstance(m, kinds) for m in base.modules())
            assert number >= 2 * 2 + 1 + 2 + 2 + 2 + 1
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        use_fast_lora(config)
        torch.manual_seed(1)
        models.append(get_peft_model(base, config).train())
        if fused and joins:
            join_projections(models[1])
    batch = packed_batch()
    losses = [loss_of(model, batch) for model in models]
    for loss in losses:
        loss.backward()
    close = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 8e-2}
    torch.testing.assert_close(losses[0], losses[1], **close)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, **close)
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    assert used["SiluGate"] == used["PackedAttention"] == 2 and used["RmsNorm"] >= 5
    assert used["DecoderLayer"] == 2 * joins


def packed_batch():
    lengths = torch.tensor([19, 1, 40, 4])
    ids = torch.randint(5, 480, (int(lengths.sum()),))
    return {"input_ids": ids, "labels": ids, "lengths": lengths}


def loss_of(model, batch):
    logits = model(**model_inputs(batch, packed_attention=True)).logits[0].float()
    return torch.nn.functional.cross_entropy(logits, batch["input_ids"])


def test_odd_sizes_and_autocast_take_the_ordinary_way(used):
    if pointwise.library() is None:
        pytest.skip("no C compiler")
    model = make_model(intermediate_size=49)
    use_fused_layers(model)
    model(torch.randint(5, 480, (1, 3)))
    assert not used["SiluGate"]
    with torch.autocast("cpu", torch.bfloat16):
        make_fused().forward(torch.randint(5, 480, (1, 16)))
    assert not used["SiluGate"]
    make_fused().forward(torch.randint(5, 480, (1, 16)))
    assert used["SiluGate"] == 2


def make_fused():
    model = make_model().requires_grad_(False)
    assert use_fused_layers(model) == 12 and use_fused_layers(model) == 0
    return model


def test_layers_of_others_with_the_same_name_are_left_alone():
    class LlamaMLP(torch.nn.Module):
        act_fn = torch.nn.SiLU()

    LlamaMLP.__module__ = "transformers_modules.somebody.modeling"
    assert use_fused_layers(torch.nn.Sequential(LlamaMLP(), torch.nn.RMSNorm(8))) == 0


def test_without_a_compiler_or_a_home_nothing_breaks(monkeypatch):
    from tinyllm.native import code

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(code.Path, "home", no_home)
    libraries = [part.library for part in (attention, head, lora, pointwise)]
    for library in libraries:
        library.cache_clear()
    try:
        assert all(library() is None for library in libraries)
        model = make_model()
        assert use_fused_layers(model) == 0 and not pointwise.takes(torch.ones(4))
    finally:
        for library in libraries:
            library.cache_clear()


def test_second_derivatives_are_refused():
    if pointwise.library() is None:
        pytest.skip("no C compiler")
    x = torch.randn(2, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(
        RmsNorm.apply(x, torch.ones(32), 1e-5).pow(2).sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_large_pages_hold_what_was_put_in():
    pages = Pages()
    tensors = [torch.randn(700, 300), torch.arange(5), torch.randn(3000, 3000)]
    copies = [pages.copy(t) for t in tensors]
    del pages
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
    assert all(c.data_ptr() % 64 == 0 for c in copies)


def test_trained_norms_keep_their_gradient():
    model = make_model()
    use_fused_layers(model)
    ids = torch.randint(5, 480, (2, 19))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
