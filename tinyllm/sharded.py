"""ZeRO-3: every process holds a part of every weight; here is how a whole one is had.

(Rajbhandari et al. 2020, arXiv:1910.02054, stage 3.)  Outside of a forward pass a weight of such a
model is an empty tensor, so that saving it as usual writes an empty adapter.
"""

from __future__ import annotations

import torch
from transformers import TrainingArguments

from tinyllm import ranks


def zero_stage(args: TrainingArguments) -> int:
    """DeepSpeed's ZeRO stage; 0 also without DeepSpeed."""
    return int(args.deepspeed_plugin.zero_stage) if args.deepspeed_plugin is not None else 0


def is_sharded(args: TrainingArguments) -> bool:
    """Whether a training spreads the weights themselves (ZeRO-3)."""
    return zero_stage(args) == 3


def num_elements(parameter: torch.nn.Parameter) -> int:
    """Size of a weight, also of one that is spread over processes."""
    return getattr(parameter, "ds_numel", parameter.numel())


def whole_state(model) -> dict[str, torch.Tensor] | None:
    """The trained weights by name, whole, on the CPU of rank 0; None on the other ranks.

    Every rank must call this.
    """
    from deepspeed.runtime.zero import GatheredParameters

    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        with GatheredParameters([parameter]):  # one at a time: the whole model may not fit
            if ranks.rank() == 0:
                state[name] = parameter.detach().cpu().clone()
    return state if ranks.rank() == 0 else None
