"""Summed cross-entropy under a head that is being trained, without ever holding all logits.

The gradients of the hidden states and of the head are computed along with the loss, some positions
at a time (Hsu et al. 2024, Liger Kernel, arXiv:2410.10989, section 3.2); `tinyllm/head_loss.py` is
the same for a frozen head.
"""

import torch

from tinyllm.head_loss import LARGE_CHUNK_ELEMENTS, exponentiate

CHUNK_ELEMENTS = {"cpu": 1 << 22}  # logits at a time: 16 MB in float32 stay in a CPU's cache


class HeadLoss(torch.autograd.Function):
    """`sum_i -log softmax(hidden_i Wᵀ)[ids_i]`; products in the dtype of autocast."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        ids: torch.Tensor,
    ) -> torch.Tensor:
        """`hidden` (n, hidden_size), `weight` (V, hidden_size), `ids` (n,) -> () float32."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        size = max(1, CHUNK_ELEMENTS.get(kind, LARGE_CHUNK_ELEMENTS) // len(weight))
        states, matrix = hidden.to(dtype), weight.to(dtype)
        loss = torch.zeros((), device=hidden.device)
        to_hidden = torch.empty_like(states)
        to_weight = torch.zeros_like(weight, dtype=torch.float32)
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(ids), size):
                here = slice(start, start + size)
                part, gradient = loss_and_gradient(states[here] @ matrix.t(), ids[here])
                loss += part
                to_hidden[here] = gradient @ matrix
                to_weight += gradient.t() @ states[here]
        ctx.save_for_backward(to_hidden, to_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Scale what the forward pass computed."""
        (to_hidden, to_weight), (first, second) = ctx.saved_tensors, ctx.dtypes
        return to_hidden.to(first) * grad, (to_weight * grad).to(second), None


def loss_and_gradient(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss, () float32, and its gradient by the logits (n, V), in their dtype."""
    dtype = logits.dtype
    logits, loss, total = exponentiate(logits.float(), ids)
    logits.div_(total)
    logits.scatter_add_(-1, ids[:, None], torch.full_like(total, -1.0))
    return loss, logits.to(dtype)
