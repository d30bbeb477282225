"""How a base may be fed packed examples: shown by trying, before training, not by a list of names.

Three short examples are run in one row, and again with other ones around the middle one, for which that
must make no difference at all; and each alone, which must give the same but for rounding.  A base that
fails (state that flows along the row, attention that knows no boundaries, positions that do not start
anew) gets the next slower way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tinyllm.attention import use_packed_attention
from tinyllm.batches import Batch, model_inputs, split
from tinyllm.errors import UserError
from tinyllm.vocabulary import embedding_rows

LENGTHS = (7, 12, 5)
MIDDLE = slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
SAME = 1e-3  # of a row of logits; products of the same shape are the same to the last bit
# But for rounding: other kernels in 16 bits differ by 0.09 after the 18 layers of a real base, and by 0.57
# where positions do not start anew.
NEAR = {torch.float32: 0.02, torch.bfloat16: 0.3, torch.float16: 0.3}


@dataclass(frozen=True)
class Packing:
    """The way that was chosen.

    Attributes:
        kernel: the model attends by ``cu_seq_lens_q``; else transformers builds the packed mask.
        one_by_one: examples must be run alone.
        why: a line to print where it is not the fastest way.
    """

    kernel: bool
    one_by_one: bool = False
    why: str = ""


def choose_packing(model) -> Packing:
    """Try the ways from fast to slow on a causal model and take the first that is right.

    Raises:
        UserError: the model cannot be run as the training runs it.
    """
    implementation = model.config._attn_implementation
    kernel = use_packed_attention(model)
    if implementation.startswith("flash_attention") or _is_scattered(model):
        return Packing(kernel)  # cannot be run here: not on this device yet, or in pieces
    alone = _logits(model, kernel=False, one_by_one=True)
    if kernel and _is_right(model, True, alone):
        return Packing(kernel=True)
    if kernel:
        model.set_attn_implementation(implementation)
    name = model.config.model_type
    if _is_right(model, False, alone):
        why = f"{name}: its attention ({implementation}) is fed packed rows through a mask: slower"
        return Packing(kernel=False, why=why)
    why = f"{name}: examples in one row would see each other, so each is run alone: slower"
    model.one_by_one = True  # for whoever measures the model later (report/rows.py)
    return Packing(kernel=False, one_by_one=True, why=why)


def _is_scattered(model) -> bool:
    """Whether DeepSpeed ZeRO-3 holds the weights in pieces."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _is_right(model, kernel: bool, alone: torch.Tensor) -> bool:
    """Whether examples in one row see nothing of each other; ``alone`` are each one's own logits."""
    packed = _logits(model, kernel)
    among_others = _logits(model, kernel, around=1)
    near = NEAR.get(model.dtype, NEAR[torch.float32])
    return _agree(packed[MIDDLE], among_others[MIDDLE], SAME) and _agree(packed, alone, near)


def _example_batch(model, around: int) -> Batch:
    """Three examples, of which the first and the last follow a seed."""
    ids, others = (
        torch.randint(
            embedding_rows(model), (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, around)
    )
    others[MIDDLE] = ids[MIDDLE]
    batch = {"input_ids": others, "labels": others, "lengths": torch.tensor(LENGTHS)}
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


@torch.no_grad()
def _logits(model, kernel: bool, one_by_one: bool = False, around: int = 0) -> torch.Tensor:
    """Logits of every position, ``(N, vocabulary)`` float32."""
    was_training = model.training
    model.eval()
    parts = []
    for batch in split(_example_batch(model, around), 1 if one_by_one else sum(LENGTHS)):
        positions = torch.arange(len(batch["input_ids"]), device=model.device)
        try:
            output = model(**model_inputs(batch, kernel), logits_to_keep=positions)
        except (TypeError, ValueError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"this base ({model.config.model_type}) cannot be trained here: {reason}"
            ) from error
        if output.logits.shape[1] != len(positions):
            raise UserError(f"this base ({model.config.model_type}) ignores logits_to_keep")
        parts.append(output.logits[0].float())
    model.train(was_training)
    return torch.cat(parts)


def _agree(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Whether every row of logits is the expected one, to a share of its norm."""
    exact = found.dtype == torch.float32 and expected.abs().max() > 0
    assert exact, "the logits are not float32, or all zero"
    difference = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-12)
    return bool(difference.max() < tolerance)
