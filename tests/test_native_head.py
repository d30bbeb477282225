"""The compiled loss under a frozen head gives what its formula gives in float64."""

import pytest
import torch
import torch.nn.functional as F
from conftest import skip_without

from tinyllm.head_loss import chunk_bytes
from tinyllm.native import head

# rows, hidden size, words: parts of a vector, a block, a group, and of the words that are read at a time
SHAPES = [
    (1, 2, 1),
    (5, 32, 64),
    (16, 30, 63),
    (33, 120, 300),
    (50, 96, 65),
    (145, 34, 200),
    (300, 64, 130),
]


@pytest.fixture(autouse=True)
def has_it(request):
    skip_without(head, request)


def make(rows, size, words, scale=1.0):
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, size), scale * torch.randn(words, size)
    return hidden.bfloat16(), weight.bfloat16(), torch.randint(0, words, (rows,))


def exact(hidden, weight, ids):
    hidden = hidden.double().requires_grad_()
    losses = F.cross_entropy(hidden @ weight.double().T, ids, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), hidden)[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_the_formula(processor, shape, scale):
    inputs = make(*shape, scale)
    losses, gradient = head.losses(*inputs, True)
    expected_losses, expected_gradient = exact(*inputs)
    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-5, atol=1e-4)
    size = expected_gradient.norm() + 1e-3 * inputs[1].double().norm()
    assert (gradient.double() - expected_gradient).norm() < 4e-3 * size
    again, none = head.losses(*inputs, False)
    assert none is None and torch.equal(again, losses)


def test_a_larger_logit_in_later_words_scales_what_came_before():
    hidden = torch.ones(20, 2).bfloat16()
    weight = torch.linspace(-30, 30, 400)[:, None].expand(400, 2).bfloat16().contiguous()
    ids = torch.arange(20) * 20
    losses, gradient = head.losses(hidden, weight, ids, True)
    expected_losses, expected_gradient = exact(hidden, weight, ids)
    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-2, atol=0.1)


def test_a_row_does_not_depend_on_the_others():
    hidden, weight, ids = make(150, 32, 200)
    losses, gradient = head.losses(hidden, weight, ids, True)
    for row in (0, 47, 48, 149):
        one, its = head.losses(hidden[row:][:1], weight, ids[row:][:1], True)
        assert torch.equal(one[0], losses[row]) and torch.equal(its[0], gradient[row])


def test_what_is_no_number_does_not_get_lost():
    hidden, weight, ids = make(20, 32, 200)
    hidden[3, 5] = torch.nan
    losses, gradient = head.losses(hidden, weight, ids, True)
    assert torch.isnan(losses[3]) and torch.isnan(gradient[3]).all()
    assert torch.isfinite(losses[[0, 1, 2, 4, 19]]).all()
    hidden[3], weight[7] = 0.0, torch.inf
    assert not torch.isfinite(head.losses(hidden, weight, ids, True)[0]).any()


def test_a_word_that_is_impossible():
    hidden, weight, ids = make(20, 32, 200)
    weight[7], hidden[3] = -torch.inf, 1.0
    expected = torch.nn.functional.cross_entropy(
        hidden.float() @ weight.float().T, ids, reduction="none"
    )
    losses, _ = head.losses(hidden, weight, ids, True)
    assert torch.isfinite(expected[3]) and ids[3] != 7
    torch.testing.assert_close(losses[3], expected[3], rtol=1e-3, atol=1e-3)


def test_a_certain_word_has_no_loss():
    hidden, weight, ids = make(20, 32, 1)
    hidden, weight = hidden.round(), weight.sign()  # their products have no roundings
    assert torch.equal(head.losses(hidden, weight, ids, False)[0], torch.zeros(20))


def test_no_rows():
    losses, gradient = head.losses(*make(0, 32, 200), True)
    assert losses.shape == (0,) and gradient.shape == (0, 32)


def test_what_it_takes():
    half = torch.zeros(4, 6, dtype=torch.bfloat16)
    assert head.takes(half, half)
    assert not head.takes(half, half.float())
    assert not head.takes(half[:, :5].contiguous()) and not head.takes(half.T)
    assert 0 < chunk_bytes(half, 10**6) < 1 << 24 < chunk_bytes(half.float(), 10**7)
