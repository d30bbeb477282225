"""A llama-like model's norms, gates, attention and whole layers compiled, for training on a CPU.

The layers stay transformers' own: same parameters, same names; only ``forward`` differs, and any case
that the compiled code does not take goes to theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from tinyllm.attention import PACKED_SDPA
from tinyllm.fast_lora import (
    can_be_packed,
    has_hooks,
    joined,
    lay_together,
    multiplies_in_strips,
    pack,
    project,
)
from tinyllm.fused_model import FusedModel
from tinyllm.native import attention, pointwise
from tinyllm.native.attention import PackedAttention
from tinyllm.native.pointwise import RmsNorm, SiluGate
from tinyllm.one_node import DecoderLayer, LayerParts, Norm
from tinyllm.packed_weights import MOST_BYTES

# Classes of transformers whose forward is literally the one of llama.
NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm")
MLPS = ("LlamaMLP", "Qwen2MLP", "Qwen3MLP", "MistralMLP")
LAYERS = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "MistralDecoderLayer")
ATTENTIONS = ("LlamaAttention", "Qwen2Attention", "Qwen3Attention", "MistralAttention")
MODELS = ("LlamaModel", "Qwen2Model", "Qwen3Model", "MistralModel")
ACTIVATIONS = ("SiLU", "SiLUActivation")


class FusedNorm(nn.Module):
    """Put before a norm's class: its ``forward`` where that applies."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.is_plain(hidden_states):
            return super().forward(hidden_states)
        return RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)

    def is_plain(self, hidden_states: torch.Tensor) -> bool:
        """Whether the compiled step computes it: frozen, of a type that it knows."""
        return not self.weight.requires_grad and _suits(hidden_states, self.weight)


class FusedMlp(nn.Module):
    """Put before an MLP's class: its ``forward`` where that applies."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        if not (_suits(gate, up) and pointwise.fills_vectors(gate)):
            return self.down_proj(self.act_fn(gate) * up)
        product = SiluGate.apply(gate.flatten(0, -2), up.flatten(0, -2))
        return self.down_proj(product.unflatten(0, x.shape[:-1]))


class FusedAttention(nn.Module):
    """Put before an attention's class: its ``forward`` over packed examples, without a cache."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        if args or not self._is_plain(hidden_states, kwargs):
            return super().forward(hidden_states, *args, **kwargs)
        projected = project(hidden_states.squeeze(0), self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (states.unflatten(-1, (-1, self.head_dim)) for states in projected)
        assert q.dtype == k.dtype == v.dtype == hidden_states.dtype
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        attended = PackedAttention.apply(q, k, v, *self.attend_with(kwargs))
        return self.o_proj(attended.flatten(1)).unsqueeze(0), None

    def attend_with(self, kwargs: dict) -> tuple:
        """What :class:`PackedAttention` takes behind queries, keys and values."""
        cos, sin = (angles[0] for angles in kwargs["position_embeddings"])
        return cos, sin, kwargs["cu_seq_lens_q"], self.scaling

    def _is_plain(self, hidden_states: torch.Tensor, kwargs: dict) -> bool:
        """Decided before anything is projected, for that must not be done twice."""
        config, starts = self.config, kwargs.get("cu_seq_lens_q")
        window = getattr(self, "sliding_window", getattr(config, "sliding_window", None))
        return (
            starts is not None
            and config._attn_implementation == PACKED_SDPA
            and kwargs.get("cache") is None
            and kwargs.get("past_key_values") is None
            and (window is None or kwargs["max_length_q"] <= window)
            and not (self.training and self.attention_dropout)
            and (  # of long examples each thread must find one's head
                kwargs["max_length_q"] <= attention.LONG
                or (len(starts) - 1) * config.num_key_value_heads >= torch.get_num_threads()
            )
            and _suits(hidden_states, *kwargs["position_embeddings"])
            and attention.takes_heads(self.head_dim, kwargs["position_embeddings"])
        )


class FusedLayer(nn.Module):
    """Put before a decoder layer's class: all of it as one node of autograd where LoRA is on every projection
    and each step is compiled.
    """

    def forward(self, hidden_states: torch.Tensor, *args, keep=None, **kwargs) -> torch.Tensor:
        """As ever, or what it gives at the positions ``keep`` ``(n,)``."""
        parts = None if args else self.parts(hidden_states, kwargs)
        if parts is None:
            found = super().forward(hidden_states, *args, **kwargs)
            return found if keep is None else found[:, keep]
        parts = parts._replace(keep=keep)
        return DecoderLayer.apply(hidden_states.squeeze(0), parts, *parts.adapters()).unsqueeze(0)

    def parts(self, x: torch.Tensor, kwargs: dict) -> LayerParts | None:
        """What the layer computes with, for ``x`` (1, N, H); None where it cannot be one node."""
        attention, mlp = self.self_attn, self.mlp
        norms = [self.input_layernorm, self.post_attention_layernorm]
        if hasattr(attention, "q_norm"):
            norms += [attention.q_norm, attention.k_norm]
        if not self._are_plain(x, kwargs, norms):
            return None
        linears = [
            joined(x, attention.q_proj, attention.k_proj, attention.v_proj),
            joined(x, attention.o_proj),
            joined(x, mlp.gate_proj, mlp.up_proj),
            joined(x, mlp.down_proj),
        ]
        if None in linears or not pointwise.fills_vectors(linears[3].weight):
            return None
        attend = attention.attend_with(kwargs)
        kinds = [Norm(m.weight, m.variance_epsilon) for m in norms]
        return LayerParts(*kinds[:2], tuple(kinds[2:]), attention.head_dim, attend, *linears)

    def _are_plain(self, x: torch.Tensor, kwargs: dict, norms: list[nn.Module]) -> bool:
        """Whether attention, MLP and norms do what their compiled steps do, and nobody looks on."""
        return (
            isinstance(self.self_attn, FusedAttention)
            and isinstance(self.mlp, FusedMlp)
            and not any(map(has_hooks, (self.self_attn, self.mlp, self.mlp.act_fn, *norms)))
            and self.self_attn._is_plain(x, kwargs)
            and all(isinstance(norm, FusedNorm) and norm.is_plain(x) for norm in norms)
        )


def _suits(*tensors: torch.Tensor) -> bool:
    """Not under autocast, which chooses the type of each step itself."""
    return not torch.is_autocast_enabled("cpu") and pointwise.takes(*tensors)


def use_fused_layers(model: nn.Module) -> int:
    """Let a model's norms, gates, attention and decoder layers compute this way.

    Returns:
        How many modules may; 0 leaves the model as it was (another architecture, or no compiler).
    """
    if pointwise.library() is None or attention.library() is None:
        return 0
    number = 0
    for module in model.modules():
        if forward := _forward_for(module):
            module.__class__ = _fused(type(module), forward)
            number += 1
    return number


def join_projections(model: nn.Module) -> None:
    """Make one product of the projections that read one input, for a model with frozen weights."""
    for layers in _reading_one_input(model):
        lay_together(*layers)


def pack_projections(model: nn.Module) -> bool:
    """Lay out the frozen weights for their products, if the copies find room in ``MOST_BYTES``.

    Returns:
        Whether it was done.
    """
    layers = _to_pack(model)
    groups = [group for group in _reading_one_input(model) if layers.issuperset(group)]
    alone = layers.difference(*groups)
    for group in [*groups, *((layer,) for layer in alone)]:
        pack(*group)
    return bool(layers)


def all_in_strips(model: nn.Module) -> bool:
    """Whether, once packed, no product of a causal model's decoder in training is oneDNN's."""
    layers = _to_pack(model)
    inside = {part for layer in layers for part in layer.modules()}
    others = [m for m in model.base_model.modules() if isinstance(m, nn.Linear) and m not in inside]
    return bool(layers) and not others and all(map(multiplies_in_strips, layers))


def bytes_of_packing(model: nn.Module) -> int:
    """What :func:`pack_projections` takes; 0 where it would do nothing."""
    return _copies_of(_to_pack(model))


def _to_pack(model: nn.Module) -> set[nn.Module]:
    """The layers that can be packed; none, if there is no room for all."""
    layers = {module for module in model.modules() if can_be_packed(module)}
    return layers if _copies_of(layers) <= MOST_BYTES else set()


def _copies_of(layers: Iterable[nn.Module]) -> int:
    """Bytes."""
    return 2 * sum(layer.base_layer.weight.nbytes for layer in layers)


def _reading_one_input(model: nn.Module) -> Iterator[tuple[nn.Module, ...]]:
    for module in model.modules():
        if isinstance(module, FusedAttention):
            yield module.q_proj, module.k_proj, module.v_proj
        elif isinstance(module, FusedMlp):
            yield module.gate_proj, module.up_proj


def _forward_for(module: nn.Module) -> type | None:
    """The faster forward for a layer; None for one that is another, or has it already."""
    name, origin = type(module).__name__, type(module).__module__
    fused = isinstance(module, FusedNorm | FusedMlp | FusedAttention | FusedLayer | FusedModel)
    if not origin.startswith("transformers.models.") or fused:
        return None
    if name in MLPS and type(module.act_fn).__name__ in ACTIVATIONS:
        return FusedMlp
    if name in ATTENTIONS:
        return FusedAttention
    if name in LAYERS:
        return FusedLayer
    if name in MODELS:
        return FusedModel
    return FusedNorm if name in NORMS else None


@functools.cache
def _fused(original: type, forward: type) -> type:
    return type(original.__name__, (forward, original), {"__module__": original.__module__})
