"""A llama-like model's norms and gates in one pass over memory each, for training on a CPU.

The layers stay transformers' own: same parameters, same names; only ``forward`` differs, and any case
that ``pointwise.c`` does not take goes to theirs.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from tinyllm.native import pointwise
from tinyllm.native.pointwise import RmsNorm, SiluGate

# Classes of transformers whose forward is literally the one of llama.
NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm")
MLPS = ("LlamaMLP", "Qwen2MLP", "Qwen3MLP", "MistralMLP")
ACTIVATIONS = ("SiLU", "SiLUActivation")


class FusedNorm(nn.Module):
    """Put before a norm's class: its ``forward`` where that applies."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.weight.requires_grad or not _suits(hidden_states, self.weight):
            return super().forward(hidden_states)
        return RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class FusedMlp(nn.Module):
    """Put before an MLP's class: its ``forward`` where that applies."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        fused = _suits(gate, up) and pointwise.fills_vectors(gate)
        return self.down_proj(SiluGate.apply(gate, up) if fused else self.act_fn(gate) * up)


def _suits(*tensors: torch.Tensor) -> bool:
    """Not under autocast, which chooses the type of each step itself."""
    return not torch.is_autocast_enabled("cpu") and pointwise.takes(*tensors)


def use_fused_layers(model: nn.Module) -> int:
    """Let a model's norms and gates compute this way.

    Returns:
        How many layers do; 0 leaves the model as it was (another architecture, or no compiler).
    """
    if pointwise.library() is None:
        return 0
    number = 0
    for module in model.modules():
        if forward := _forward_for(module):
            module.__class__ = _fused(type(module), forward)
            number += 1
    return number


def _forward_for(module: nn.Module) -> type | None:
    """The faster forward for a layer; None for one that is another, or has it already."""
    name, origin = type(module).__name__, type(module).__module__
    if not origin.startswith("transformers.models.") or isinstance(module, FusedNorm | FusedMlp):
        return None
    if name in MLPS and type(module.act_fn).__name__ in ACTIVATIONS:
        return FusedMlp
    return FusedNorm if name in NORMS else None


@functools.cache
def _fused(original: type, forward: type) -> type:
    return type(original.__name__, (forward, original), {"__module__": original.__module__})
