"""Muon for the hidden matrices, AdamW for everything else.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum, then the update is replaced
by the nearest orthogonal matrix, found by a Newton-Schulz iteration. `torch.optim.Muon` iterates in
bfloat16, which is slow on a CPU without native bfloat16; this one is told in what to iterate, and
iterates over all matrices of one shape at once.
"""

from collections import defaultdict

import torch
from torch import nn
from torch.optim import Optimizer

from tinyllm.pretrain.settings import Settings

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(update: torch.Tensor, num_iterations: int = 5) -> torch.Tensor:
    """Nearly orthogonal matrices from a batch (N, rows, columns); singular values end in 0.7-1.2."""
    a, b, c = COEFFICIENTS
    tall = update.size(-2) > update.size(-1)
    x = update.mT if tall else update
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x.mT if tall else x


class Muon(Optimizer):
    """Orthogonalised Nesterov momentum with decoupled weight decay, for 2-D weights."""

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`dtype` is that of the iteration; weights, momentum and update keep their own."""
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update; weights of one shape are handled as one batch."""
        for group in self.param_groups:
            shapes = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for same_shape in shapes.values():
                self._step_batch(same_shape, group)

    def _step_batch(self, params: list[nn.Parameter], group: dict) -> None:
        updates = []
        for parameter in params:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            updates.append(parameter.grad.lerp(state["momentum"], group["momentum"]))
        batch = orthogonalize(torch.stack(updates).to(self.dtype)).to(updates[0].dtype)
        rows, columns = batch.shape[-2:]
        scale = max(1.0, rows / columns) ** 0.5
        for parameter, update in zip(params, batch, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * scale)


def build_optimizers(model: nn.Module, settings: Settings, bf16: bool) -> list[Optimizer]:
    """[Muon for the matrices inside the layers, AdamW for embeddings and norms], or AdamW alone."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and ".layers." in name]
    chosen = set(matrices)
    groups = [{"params": [p for _, p in named if p not in chosen], "weight_decay": 0.0}]
    if alone := settings.optimizer == "adamw":
        groups.append({"params": matrices, "weight_decay": settings.weight_decay})
    adamw = torch.optim.AdamW(groups, lr=settings.adamw_lr, betas=(0.9, 0.95))
    if alone:
        return [adamw]
    dtype = torch.bfloat16 if bf16 else torch.float32
    return [
        Muon(matrices, settings.muon_lr, settings.momentum, settings.weight_decay, dtype), adamw
    ]  # fmt: skip
