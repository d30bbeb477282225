"""The compiled low-rank path gives what its formula gives in float64, and what PyTorch's products give."""

import pytest
import torch
from conftest import skip_without

from tinyllm import lora_by_torch
from tinyllm.dropout import Dropout, mask
from tinyllm.native import lora

SHAPES = [
    (64, 32, 64, 16),
    (37, 96, 32, 4),
    (1, 32, 32, 1),
    (130, 64, 96, 20),
    (5, 32, 160, 64),
    (70, 120, 20, 16),
    (9, 4, 2, 3),
    (65, 36, 70, 8),
]


@pytest.fixture(autouse=True)
def has_it(request):
    skip_without(lora, request)


def make(rows, width, out, rank):
    torch.manual_seed(0)
    halves = [torch.randn(rows, n).bfloat16() for n in (width, out, out, width)]
    return *halves, torch.randn(rank, width), torch.randn(out, rank)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_formula(processor, shape, p):
    x, y, grad, dx, a, b = make(*shape)
    dropout, scale = Dropout(p) if p else None, 1.7
    kept = mask(x.shape, dropout.seed, dropout.threshold) if dropout else torch.ones_like(x)
    seen, exact_a, exact_b = x.double() * kept, a.bfloat16().double(), b.bfloat16().double()
    low = (seen @ exact_a.T).bfloat16().double()
    grad_low = (scale * (grad.double() @ exact_b)).bfloat16().double()
    expected_y = y.double() + scale * low @ exact_b.T
    expected_dx = dx.double() + kept * (grad_low @ exact_a)

    (found_low,) = lora.add_forward(x, [a], [b], [y], [dropout], [scale])
    ((da, db),) = lora.add_backward(x, [a], [b], [found_low], [grad], dx, [dropout], [scale])
    rank = len(a)
    rounding = {"atol": 5e-2, "rtol": 1e-2}  # of bfloat16, once
    assert not found_low[:, rank:].any()
    torch.testing.assert_close(found_low[:, :rank].double(), low, **rounding)
    torch.testing.assert_close(y.double(), expected_y, **rounding)
    torch.testing.assert_close(dx.double(), expected_dx, **rounding)
    for found, expected in ((da, grad_low.T @ seen), (db, scale * grad.double().T @ low)):
        assert (found - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_pytorchs_products_agree(monkeypatch, p):
    monkeypatch.setattr(lora_by_torch, "cpu_multiplies_bf16", lambda: False)  # float32: exact
    x, y, grad, dx, a, b = make(70, 64, 96, 8)
    dropout, results = Dropout(p) if p else None, []
    for part in (lora, lora_by_torch):
        own_y, own_dx = y.clone(), dx.clone()
        lows = part.add_forward(x, [a], [b], [own_y], [dropout], [0.5])
        (gradients,) = part.add_backward(x, [a], [b], lows, [grad], own_dx, [dropout], [0.5])
        results.append([own_y.float(), own_dx.float(), *gradients])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < 1e-2 * expected.norm()


def test_where_nothing_reaches_the_input_nothing_is_added():
    x, _, grad, _, a, b = make(9, 32, 32, 4)
    lows = lora.add_forward(x, [a], [b], [torch.zeros(9, 32, dtype=x.dtype)], [None], [1.0])
    (with_dx,) = lora.add_backward(x, [a], [b], lows, [grad], torch.zeros_like(x), [None], [1.0])
    (without,) = lora.add_backward(x, [a], [b], lows, [grad], None, [None], [1.0])
    assert all(torch.equal(i, j) for i, j in zip(with_dx, without, strict=True))


@pytest.mark.parametrize("rows", [1, 9, 70, 200])
def test_layers_with_one_input_are_as_one_after_the_other(processor, rows):
    shapes = [(rows, 64, out, rank) for out, rank in ((96, 8), (32, 8), (34, 20))]
    x, _, _, dx, _, _ = make(*shapes[0])
    parts = [make(*shape) for shape in shapes]
    ys, grads, downs, ups = ([part[i] for part in parts] for i in (1, 2, 4, 5))
    drops, scales = [Dropout(0.3), None, Dropout(0.1)], [0.5, 1.0, 2.0]
    together, alone = [y.clone() for y in ys], [y.clone() for y in ys]
    dx_together, dx_alone = dx.clone(), dx.clone()

    lows = lora.add_forward(x, downs, ups, together, drops, scales)
    found = lora.add_backward(x, downs, ups, lows, grads, dx_together, drops, scales)
    for i, (low, (da, db)) in enumerate(zip(lows, found, strict=True)):
        one = [[of[i]] for of in (downs, ups, alone, drops, scales)]
        (expected,) = lora.add_forward(x, *one)
        assert torch.equal(low, expected)
        one[2] = [grads[i]]
        ((own_da, own_db),) = lora.add_backward(x, *one[:2], [low], one[2], dx_alone, *one[3:])
        assert torch.equal(da, own_da) and torch.equal(db, own_db)
    # rounded once after all layers, and after each of them
    assert (dx_together - dx_alone).float().norm() < 1e-2 * dx_alone.float().norm()
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("part", [lora, lora_by_torch])
def test_what_comes_past_the_layer_is_added_to_its_output(part):
    x, y, _, _, a, b = make(37, 64, 36, 8)
    past, with_past, without = torch.randn(37, 36).bfloat16(), y.clone(), y.clone()
    part.add_forward(x, [a], [b], [without], [None], [0.5])
    part.add_forward(x, [a], [b], [with_past], [None], [0.5], past)
    assert torch.equal(with_past, without + past)


def test_broken_numbers_stay_broken():
    for value in (float("nan"), float("inf")):
        x, y, grad, dx, a, b = make(9, 32, 32, 4)
        x[3, 5] = grad[4, 6] = value
        lows = lora.add_forward(x, [a], [b], [y], [None], [1.0])
        ((da, db),) = lora.add_backward(x, [a], [b], lows, [grad], dx, [None], [1.0])
        assert not y[3].isfinite().all() and not dx[4].isfinite().all()
        assert not da.isfinite().all() and not db.isfinite().all()


def test_what_it_does_not_take():
    x, _, _, _, a, b = make(9, 32, 64, 4)
    assert lora.takes(x, a, b)
    assert not lora.takes(x.float(), a, b)
    assert not lora.takes(x, a.bfloat16(), b)
    assert not lora.takes(x[:, :30].contiguous(), a[:, :30].contiguous(), b)
    assert not lora.takes(x[:8].t(), a[:, :8].contiguous(), b)
    assert not lora.takes(x, a, b[:21].contiguous())


def joint(rows, width, outs, rank=8):
    """Layers with one input: x, their weights, biases, adapters, and gradients beside each other."""
    torch.manual_seed(0)
    x, grads = torch.randn(rows, width).bfloat16(), torch.randn(rows, sum(outs)).bfloat16()
    weights = [torch.randn(out, width).bfloat16() for out in outs]
    downs = [torch.randn(rank, width) for _ in outs]
    ups = [torch.randn(out, rank) for out in outs]
    return x, weights, torch.randn(sum(outs)).bfloat16(), downs, ups, grads


LAYERS = [
    (70, 120, (120, 120, 120), 20),
    (0, 64, (32,)),
    (1, 64, (34,)),
    (200, 36, (96, 40)),
    (8, 384, (32, 2, 64)),
    (67, 100, (700,)),
]


@pytest.mark.parametrize("shape", LAYERS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_layer_and_adapter_at_once(processor, shape, with_bias):
    x, weights, bias, downs, ups, grads = joint(*shape)
    bias, scales, drops = bias if with_bias else None, [0.5] * len(ups), [Dropout(0.3)] * len(ups)
    outs = list(shape[2])
    strips = lora.strips_of(weights)
    y, dx = (
        torch.full_like(grads, torch.nan),
        torch.full_like(x, torch.nan),
    )  # written, not added to
    outputs, columns = y.split(outs, 1), grads.split(outs, 1)
    lows = lora.add_forward(x, downs, ups, outputs, drops, scales, None, strips, bias)
    found = lora.add_backward(x, downs, ups, lows, columns, dx, drops, scales, strips)

    weight = torch.cat(weights).double()
    known_y = (x.double() @ weight.T + (0 if bias is None else bias.double())).bfloat16()
    known_dx = (grads.double() @ weight).bfloat16()
    known_lows = lora.add_forward(x, downs, ups, known_y.split(outs, 1), drops, scales)
    known = lora.add_backward(x, downs, ups, lows, columns, known_dx, drops, scales)
    for one, other in ((y, known_y), (dx, known_dx)):
        assert (one.float() - other.float()).norm() <= 5e-3 * other.float().norm()
        torch.testing.assert_close(one, other, atol=0.5, rtol=2e-2)
    assert all(torch.equal(a, b) for a, b in zip(lows, known_lows, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(sum(found, ()), sum(known, ()), strict=True))


def test_layer_and_adapter_and_what_comes_past():
    x, weights, bias, downs, ups, grads = joint(37, 64, (36,))
    strips, past, drops = lora.strips_of(weights), grads.flip(0), [Dropout(0.3)]
    without, with_past = torch.empty(2, 37, 36).bfloat16()
    for to, more in ((without, None), (with_past, past)):
        lora.add_forward(x, downs, ups, [to], drops, [0.5], more, strips, bias)
    assert torch.equal(with_past, without + past)


def test_strips_are_read_from_weights_that_lie_anyhow():
    numbers = torch.randn(34 * 8 + 1).bfloat16()
    expected = lora.strips_of([numbers[1:].clone().view(34, 8)])
    for weight in (numbers[1:].view(34, 8), numbers[1:].view(34, 8).t().contiguous().t()):
        found = lora.strips_of([weight])
        assert torch.equal(found.ahead[0], expected.ahead[0])
        assert torch.equal(found.back, expected.back)


def test_strips_hold_all_numbers_and_zeros():
    weights = [torch.arange(1, 34 * 8 + 1).view(34, 8).bfloat16(), torch.ones(2, 8).bfloat16()]
    strips = lora.strips_of(weights)
    assert [t.shape for t in strips.ahead] == [(2, 4, 32), (1, 4, 32)] and strips.back.shape == (
        1,
        18,
        32,
    )
    halves = (
        strips.ahead[0].view(torch.bfloat16).unflatten(2, (32, 2))
    )  # (strip, pair, column, which)
    assert torch.equal(halves.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:34], weights[0])
    assert not halves[1, :, 2:].any()
    halves = strips.back.view(torch.bfloat16).unflatten(2, (32, 2))[0]  # (pair, column, which)
    assert torch.equal(halves.transpose(1, 2).flatten(0, 1)[:, :8], torch.cat(weights))
