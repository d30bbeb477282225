"""Forgetting gradients without a walk through the modules leaves nothing of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from tinyllm.zero_grad import ZeroGrad, quick_zero_grad


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model[0].weight.requires_grad_(False)
    return model


def optimizer_of(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def gradients(model):
    model(torch.ones(4, 3)).sum().backward()
    return [p.grad for p in model.parameters()]


def test_no_gradient_is_left_and_the_method_of_the_class_returns(model):
    with quick_zero_grad(model, optimizer_of(model)):
        assert isinstance(model.zero_grad, ZeroGrad)
        assert any(g is not None for g in gradients(model))
        model.zero_grad()
        assert not any(p.grad is not None for p in model.parameters())
    assert "zero_grad" not in vars(model)


def test_zeros_where_they_are_wanted(model):
    gradients(model)
    ZeroGrad(model, optimizer_of(model))(set_to_none=False)
    assert [p.grad is None or not p.grad.any() for p in model.parameters()] == [True] * 4
    assert model[1].weight.grad is not None


def test_a_parameter_unfrozen_meanwhile_is_known(model):
    with quick_zero_grad(model, optimizer_of(model)):
        model[0].weight.requires_grad_(True)
        assert gradients(model)[0] is not None
        model.zero_grad()
        assert model[0].weight.grad is None


def test_a_parameter_that_the_optimizer_got_meanwhile_is_known(model):
    optimizer = optimizer_of(model)
    with quick_zero_grad(model, optimizer):
        model.append(nn.Linear(1, 1))
        optimizer.add_param_group({"params": list(model[2].parameters())})
        gradients(model)
        model.zero_grad()
        assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_the_method_of_its_class(model, copied):
    with quick_zero_grad(model, optimizer_of(model)):
        other = copied(model)
        other.append(nn.Linear(1, 1))
        gradients(other)
        other.zero_grad()
    assert not any(p.grad is not None for p in other.parameters())


def test_the_method_of_somebody_else_stays(model):
    calls = []
    model.zero_grad = lambda set_to_none=True: calls.append(set_to_none)
    with quick_zero_grad(model, optimizer_of(model)):
        model.zero_grad()
    model.zero_grad()
    assert calls == [True, True]


def test_its_attributes_can_be_copied_alone(model):
    with quick_zero_grad(model, optimizer_of(model)):
        assert callable(copy.deepcopy(dict(vars(model)))["zero_grad"])


def test_it_returns_after_a_fault(model):
    with pytest.raises(KeyError), quick_zero_grad(model, optimizer_of(model)):
        raise KeyError
    assert "zero_grad" not in vars(model)
