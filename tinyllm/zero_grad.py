"""A model's gradients forgotten without a walk through all of its modules.

``Module.zero_grad`` looks for the parameters anew each time.  For a small model under LoRA, hundreds of modules
with a few parameters each, that is 3 % of a training step on a CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import chain
from types import MethodType

import torch
from torch import nn


@contextlib.contextmanager
def quick_zero_grad(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Meanwhile ``model.zero_grad`` is a :class:`ZeroGrad`, unless somebody has put another one there."""
    vars(model).setdefault("zero_grad", mine := ZeroGrad(model, optimizer))
    try:
        yield
    finally:
        if vars(model).get("zero_grad") is mine:
            del model.zero_grad  # the class's own is there again


class ZeroGrad:
    """What ``model.zero_grad`` does, for the parameters that the model has when this is made, frozen ones, too, and
    those that ``optimizer`` has when it is called.

    A copy of the model, and one that is pickled, has its class's own method instead.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.parameters = model, optimizer, list(model.parameters())

    def __call__(self, set_to_none: bool = True) -> None:
        if not set_to_none:
            return type(self.model).zero_grad(self.model, set_to_none=False)
        trained = (group["params"] for group in self.optimizer.param_groups)
        for parameter in chain(self.parameters, *trained):
            if parameter.grad is not None:
                parameter.grad = None

    def __deepcopy__(self, memo: dict) -> MethodType:
        copied = memo.get(id(self.model), self.model)  # made before its attributes are copied
        return MethodType(type(copied).zero_grad, copied)

    def __reduce__(self) -> tuple:
        return getattr, (self.model, "zero_grad")  # before it has this attribute
