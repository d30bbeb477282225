"""Weights laid out for their products give the same products, and are never used for other weights."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import make_fused_lora, make_model, skip_without_compiler
from peft import LoraConfig, get_peft_model
from torch import nn

from tinyllm import fast_lora, fused_layers, packed_weights
from tinyllm.batches import model_inputs
from tinyllm.fast_lora import FastLoraLinear, use_fast_lora
from tinyllm.fused_layers import pack_projections
from tinyllm.native import lora
from tinyllm.packed_weights import PackedWeight, linear, linear_back

BATCH = {"lengths": torch.tensor([19, 1, 44])}


@pytest.fixture(autouse=True, params=["oneDNN", "strips"])
def way(request, monkeypatch):
    """Who multiplies."""
    if request.param == "strips":
        if not packed_weights.in_strips([torch.empty(8, 8)]):
            pytest.skip("a processor without strips")
        return request.param
    if not packed_weights.works():
        pytest.skip(
            "a processor that does not multiply bfloat16, or a PyTorch without the operations"
        )
    monkeypatch.setattr(fast_lora, "in_strips", lambda weights: False)
    return request.param


@pytest.fixture
def multiplied(monkeypatch, way):
    """How often a packed weight was multiplied with."""
    found = []
    if way == "oneDNN":
        real = packed_weights._multiply
        monkeypatch.setattr(packed_weights, "_multiply", lambda *of: found.append(1) or real(*of))
        return found
    forward, backward = lora.add_forward, lora.add_backward

    def ahead(x, downs, ups, outputs, dropouts, scales, past=None, strips=None, bias=None):
        found.extend([1] * (strips is not None))
        return forward(x, downs, ups, outputs, dropouts, scales, past, strips, bias)

    def back(x, downs, ups, lows, grads, dx, dropouts, scales, strips=None):
        found.extend([1] * (strips is not None and dx is not None))
        return backward(x, downs, ups, lows, grads, dx, dropouts, scales, strips)

    monkeypatch.setattr(lora, "add_forward", ahead)
    monkeypatch.setattr(lora, "add_backward", back)
    return found


def make(joins=True):
    skip_without_compiler()
    base = make_model(attention_bias=True).to(torch.bfloat16)
    return make_fused_lora(base, joins, r=4, target_modules="all-linear")


def step(model):
    """Loss and gradients of one packed batch."""
    torch.manual_seed(2)
    ids = torch.randint(5, 480, (64,))
    inputs = model_inputs(BATCH | {"input_ids": ids, "labels": ids}, packed_attention=True)
    loss = F.cross_entropy(model(**inputs).logits[0].float(), ids)
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def same(one, other, way="oneDNN"):
    """Bit for bit; by strips sums are rounded once, not twice, and by tiles some to the other neighbour."""
    pairs = list(zip(one, other, strict=True))
    if way == "oneDNN" and not packed_weights.has_tiles():
        return all(torch.equal(a, b) for a, b in pairs)
    most = 8e-2 if way == "strips" else 1e-2
    return all((a - b).norm() < most * b.norm() for a, b in pairs)


@pytest.mark.parametrize("seed", [0, 2])
@pytest.mark.parametrize("rows", [1, 2, 37, 64, 640, 700])
@pytest.mark.parametrize(("inside", "outside"), [(384, 640), (120, 360), (64, 48), (36, 100)])
def test_products_are_the_same(rows, inside, outside, way, seed):
    if way == "strips":
        pytest.skip("a layer is computed with its adapter: tests/test_native_lora.py")
    torch.manual_seed(seed)
    x, grad = (torch.randn(rows, n).bfloat16() for n in (inside, outside))
    weight, bias = torch.randn(outside, inside).bfloat16(), torch.randn(outside).bfloat16()
    packed = PackedWeight([weight], weight)
    for with_bias in (None, bias):
        found, exact = linear(x, weight, with_bias, packed), x.double() @ weight.t().double()
        if with_bias is not None:
            exact += with_bias
        assert alike(found, F.linear(x, weight, with_bias), exact)
    assert alike(linear_back(grad, weight, packed), grad @ weight, grad.double() @ weight.double())


def alike(found, expected, exact):
    """Bit for bit; with tiles both are the exact sum rounded once, and nearly all are equal."""
    if not packed_weights.has_tiles():
        return torch.equal(found, expected)
    half_a_place = torch.exp2(exact.abs().clamp(min=2**-20).log2().floor() - 8)
    rounded = all(((y - exact).abs() <= half_a_place + 1e-4).all() for y in (found, expected))
    return rounded and (found != expected).sum() <= 1 + found.numel() / 1000


@pytest.mark.parametrize("joins", [False, True])
def test_training_is_the_same(multiplied, joins, way):
    expected, model = step(make(joins)), make(joins)
    assert pack_projections(model) and not multiplied
    assert same(step(model), expected, way)
    products = 2 * 4 if joins else 2 * 7  # of two layers; the first one's input has no gradient
    assert len(multiplied) == 2 * products - (1 if joins else 3)


CHANGES = {
    "in place": lambda linear: linear.weight.mul_(1.5),
    "loaded": lambda linear: linear.load_state_dict(
        {"weight": linear.weight / 2, "bias": linear.bias}
    ),
    "replaced": lambda linear: setattr(linear.weight, "data", linear.weight.data * 3),
    "other": lambda linear: setattr(
        linear, "weight", nn.Parameter(linear.weight * 3, requires_grad=False)
    ),
}


def test_a_weight_that_was_turned_in_its_place_is_another(multiplied):
    weight = nn.Parameter(torch.randn(32, 32).bfloat16(), requires_grad=False)
    packed = PackedWeight([weight], weight)
    assert packed.is_of([weight])
    weight.data = weight.data.t()
    assert not packed.is_of([weight])


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "o_proj"])
def test_a_weight_that_has_changed_is_not_taken_for_the_packed_one(change, name, way):
    found = []
    for packs in (False, True):
        model = make()
        if packs:
            pack_projections(model)
            before = step(model)
        with torch.no_grad():
            CHANGES[change](getattr(model.get_decoder().layers[0].self_attn, name).base_layer)
        found.append(step(model))
    assert same(*found, way) and not same(before, found[1], way)


def test_nor_is_one_that_has_got_its_memory():
    """What is replaced is freed, and what replaces it next may lie there."""
    layer = next(m for m in make().modules() if isinstance(m, FastLoraLinear))
    weight = layer.base_layer.weight
    for size in (weight.shape, (128, 128), (192, 192)):
        weight.data = torch.randn(size).bfloat16()
        packed = PackedWeight([weight], weight)
        for _ in range(8):
            weight.data = weight.data * 1.5
            assert not packed.is_of([weight])


@pytest.mark.parametrize("name", ["q_proj", "v_proj", "down_proj"])
def test_nor_is_one_that_was_merged_and_unmerged(multiplied, name):
    model = make()
    pack_projections(model)
    layer = next(m for n, m in model.named_modules() if n.endswith(f"layers.1.{path(name)}"))
    before = layer.base_layer.weight.clone()
    layer.merge()
    assert not torch.equal(layer.base_layer.weight, before)
    layer.unmerge()  # which rounds
    step(model)
    all_of_them = 2 * 8 - 1
    assert len(multiplied) == all_of_them - 2
    del multiplied[:]
    pack_projections(model)
    step(model)
    assert len(multiplied) == all_of_them


def path(name):
    return f"mlp.{name}" if name == "down_proj" else f"self_attn.{name}"


def test_merging_counts_as_a_change():
    layer = next(m for m in make().modules() if isinstance(m, FastLoraLinear))
    for change in (layer.merge, layer.unmerge):
        before = layer.base_layer.weight._version
        change()
        assert layer.base_layer.weight._version > before


def test_too_much_for_the_memory_stays_as_it_is(monkeypatch, multiplied):
    monkeypatch.setattr(fused_layers, "MOST_BYTES", 1000)
    model = make()
    assert not pack_projections(model)
    step(model)
    assert not multiplied


def test_only_frozen_bfloat16_is_packed(multiplied):
    model = make().float()
    assert not pack_projections(model)
    trained = make()
    trained.requires_grad_(True)
    assert not pack_projections(trained) and not multiplied


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_weights_of_their_own(duplicate):
    layer = next(m for m in make().modules() if isinstance(m, FastLoraLinear))
    layer.packed = PackedWeight([layer.base_layer.weight], layer.base_layer.weight)
    assert duplicate(layer.packed) is None and copy.deepcopy(layer).packed is None
    assert not any("packed" in key for key in layer.state_dict())


def test_an_odd_bias_is_read_as_ever():
    torch.manual_seed(0)
    x, weight = torch.randn(64, 32).bfloat16(), torch.randn(48, 32).bfloat16()
    packed, wide = PackedWeight([weight], weight), torch.randn(48, 2).bfloat16()
    expected = F.linear(x, weight, wide[:, 0])
    assert torch.equal(linear(x, weight, wide[:, 0], packed), expected)
    with pytest.raises(RuntimeError):
        linear(x, weight, wide[:, 0].float(), packed)


def half(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


def stride_biases(model):
    for layer in model.modules():
        if isinstance(layer, FastLoraLinear) and layer.base_layer.bias is not None:
            bias = layer.base_layer.bias
            bias.data = torch.stack([bias.data, torch.ones_like(bias.data)], 1)[:, 0]


@pytest.mark.parametrize("change", [half, stride_biases])
def test_what_the_compiled_layers_do_not_take_is_not_laid_out_for_them(change, way):
    """Also where it becomes so later."""
    for early in (True, False):
        model, expected = make(joins=False), make(joins=False)
        for one in (model, expected):
            if early or one is expected:
                change(one)
        if early:
            assert not fused_layers.all_in_strips(model.get_base_model())
        pack_projections(model)
        change(model)
        if early:
            layers = [m for m in model.modules() if isinstance(m, FastLoraLinear)]
            biased = [m for m in layers if change is half or m.base_layer.bias is not None]
            assert all(m.packed.strips is None for m in biased)
        assert same(step(model), step(expected), way)


def test_variants_of_lora_are_left_alone():
    base = make_model().to(torch.bfloat16)
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=True)
    use_fast_lora(config)
    model = get_peft_model(base, config)
    assert not pack_projections(model)


def test_without_the_operations_nothing_is_packed(monkeypatch):
    def gone(weight):
        raise AttributeError("no such operation")

    monkeypatch.setattr(fast_lora, "in_strips", lambda weights: False)

    packed_weights.works.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(packed_weights, "_pack", gone)
        assert not packed_weights.works() and not pack_projections(make())
    packed_weights.works.cache_clear()


def test_operations_that_give_something_else_are_not_used(monkeypatch):
    packed_weights.works.cache_clear()
    with monkeypatch.context() as patched:
        real = packed_weights._multiply
        patched.setattr(packed_weights, "_multiply", lambda *of: real(*of) * 1.01)
        assert not packed_weights.works()
    packed_weights.works.cache_clear()
