"""Cross-entropy under a frozen head without ever holding all logits.

The logits of a micro-batch are its largest tensor: 512 positions over 65,000 words are 133 MB, and
PyTorch's cross-entropy holds them three times over.  The head is frozen, so all that the backward
pass needs is the gradient of the hidden states, which is computed here along with the loss, a few
positions at a time, in one buffer that stays in the cache (the idea of Hsu et al. 2024, Liger Kernel,
arXiv:2410.10989, section 3.2, for a head without a gradient of its own).  Where the CPU multiplies
bfloat16 in hardware, ``native/head.c`` does it without any logits in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tinyllm.fused_model import FusedModel
from tinyllm.native import head as compiled
from tinyllm.native import pointwise

# Their forward is hidden states → lm_head, nothing between and nothing behind (no soft-capping,
# no scaling), which tests/test_head_loss.py holds against the whole model.
PLAIN_HEADS = ("llama", "qwen2", "qwen3", "mistral", "tinyllm")
# Logits at a time: few enough for a CPU's cache and enough rows for a fast product (2 M take up to 1.9
# times as long with 49,152 words, 1.2 times in float32); a GPU wants large products.
CHUNK_ELEMENTS = {"cpu": 1 << 23}
LARGE_CHUNK_ELEMENTS = 1 << 26
# On a CPU, oneDNN prepares a product in bfloat16 anew for each number of rows and keeps it: then few
# numbers of rows.
FILLED = 32


class FrozenHeadLoss(torch.autograd.Function):
    """``sum_i -log softmax(hidden_i Wᵀ)[ids_i]`` with a frozen ``W``."""

    @staticmethod
    def forward(ctx, hidden, weight, ids):
        """``hidden`` (n, hidden_size), ``weight`` (V, hidden_size), ``ids`` (n,) → () float32."""
        needed = ctx.needs_input_grad[0]
        if compiled.takes(hidden, weight):
            losses, gradient = compiled.losses(hidden, weight, ids, needed)
            loss = losses.sum()
        else:
            loss, gradient = by_torch(hidden, weight, ids, needed)
        if needed:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


def by_torch(hidden, weight, ids, with_gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The loss () float32 and its gradient (n, hidden_size), or None, a few positions at a time."""
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    gradient = torch.empty_like(hidden) if with_gradient else None
    size = chunk_rows(weight)
    for start in range(0, len(ids), size):
        here = slice(start, start + size)
        states = hidden[here]
        logits = fill_up(states) @ weight.t()  # (size, V)
        logits, part, total = exponentiate(logits, ids[here])
        loss += part
        if gradient is not None:  # softmax(logits) W - W[ids]
            mean = (logits.to(weight.dtype) @ weight)[: len(states)].float().div_(total)
            gradient[here] = mean.sub_(weight[ids[here]])
    return loss, gradient


def chunk_rows(weight: torch.Tensor) -> int:
    """Positions at a time under the head ``weight`` (V, hidden_size)."""
    rows = CHUNK_ELEMENTS.get(weight.device.type, LARGE_CHUNK_ELEMENTS) / len(weight)
    return max(1, round(rows / FILLED)) * FILLED if is_filled_up(weight) else max(1, int(rows))


def chunk_bytes(weight: torch.Tensor, num_positions: int) -> int:
    """Most memory that the logits of so many positions take at a time under the head ``weight``."""
    if compiled.takes(weight):
        return compiled.scratch_bytes(weight)
    rows = min(chunk_rows(weight), num_positions)
    if is_filled_up(weight):
        rows += -rows % FILLED
    chunk = rows * len(weight)
    if pointwise.takes(weight):
        return chunk * weight.element_size()
    return chunk * (torch.float32.itemsize + weight.element_size())


def fill_up(states: torch.Tensor) -> torch.Tensor:
    """``states`` (n, hidden_size), and zeros up to a multiple of :data:`FILLED` where that pays."""
    return F.pad(states, (0, 0, 0, -len(states) % FILLED)) if is_filled_up(states) else states


def is_filled_up(tensor: torch.Tensor) -> bool:
    """Whether products of this tensor get a number of rows that few others have."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"


def exponentiate(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Exponentials of logits (n or more, V), each row up to a factor; the logits' memory may be used.

    Returns:
        The exponentials; the summed cross-entropy of ``ids`` (n,) in the first n rows, () float32; and
        those rows' sums, (n, 1), by which their exponentials are to be divided to be probabilities.
    """
    if pointwise.takes(logits):
        losses, totals = pointwise.exponentiate(logits[: len(ids)], ids)
        return logits, losses.sum(), totals[:, None]
    logits = logits.float()
    here = logits[: len(ids)]
    here.sub_(here.amax(-1, keepdim=True))
    wanted = here.gather(-1, ids[:, None])
    total = here.exp_().sum(-1, keepdim=True)
    return logits, (total.log() - wanted).sum(), total


def has_plain_frozen_head(model) -> bool:
    """Whether a causal model's loss can be computed by :func:`frozen_head_loss`."""
    head = model.get_output_embeddings()
    return (
        model.config.model_type in PLAIN_HEADS
        and type(head) is nn.Linear
        and head.bias is None
        and not head.weight.requires_grad
    )


def frozen_head_loss(
    model, inputs: dict, positions: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """Summed cross-entropy at some positions of one packed row, () float32.

    Args:
        model: a causal model for which :func:`has_plain_frozen_head` holds.
        inputs: keyword arguments of its decoder, ids of shape ``(1, N)``.
        positions: where something is predicted, ``(n,)``.
        ids: what is predicted there, ``(n,)``.
    """
    decoder = model.base_model
    if isinstance(decoder, FusedModel):
        hidden = decoder(**inputs, keep=positions).last_hidden_state[0]
    else:
        hidden = decoder(**inputs).last_hidden_state[0, positions]
    return FrozenHeadLoss.apply(hidden, model.get_output_embeddings().weight, ids)
