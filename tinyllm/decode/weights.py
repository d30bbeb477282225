"""A llama-like model's weights, laid out for writing one token after another on a CPU.

Projections that read the same input are one matrix, an adapter is added in (``W + s B A``, as a merge
does), and wide matrices lie transposed: a product with a single row then reads memory in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from tinyllm.base import plain_model

MAX_PARAMETERS = 700_000_000  # the layout is a second copy; larger models gain little from it


class Matrix(NamedTuple):
    """``y = x W + b``; ``weight`` is ``(in, out)`` in memory order or a view that is."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return torch.mm(x, self.weight)
        return torch.addmm(self.bias, x, self.weight)


class Layer(NamedTuple):
    """One decoder layer."""

    attention_norm: torch.Tensor
    qkv: Matrix
    attention_out: Matrix
    mlp_norm: torch.Tensor
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True)
class Weights:
    """The whole model.

    Attributes:
        embedding: ``(V, H)``
        head: ``(H, V)``
        rotation: ``(S, D / 2)`` complex, position by position (Su et al. 2021, arXiv:2104.09864).
        context: longest sequence ``S`` in tokens.
    """

    embedding: torch.Tensor
    layers: list[Layer]
    norm: torch.Tensor
    head: Matrix
    rotation: torch.Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    context: int


def unsupported(model) -> str | None:
    """Why a model cannot be laid out this way; None if it can."""
    base = plain_model(model)
    config = base.config
    name = type(base).__name__
    if name not in ("LlamaForCausalLM", "Qwen2ForCausalLM", "TinyllmForCausalLM"):
        return f"{name} is not among the architectures it knows"
    if getattr(base, "hf_quantizer", None) is not None:
        return "the model is quantised"
    parameters = list(base.parameters())
    if any(p.device.type != "cpu" for p in parameters):
        return "it is made for the CPU"
    if any(p.dtype != torch.float32 for p in parameters):
        return "it computes in float32 only"
    if sum(p.numel() for p in parameters) > MAX_PARAMETERS:
        return f"the model has more than {MAX_PARAMETERS // 1_000_000} million parameters"
    if config.hidden_act != "silu" or config.rope_parameters.get("rope_type") != "default":
        return "its activation or rotary positions are of another kind"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        return "it has sliding-window attention"
    return _unsupported_layers(base)


def _unsupported_layers(base) -> str | None:
    """Why one of the modules is none that :func:`lay_out` reads; None if all are."""
    allowed = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    linears = {f"{part}.{name}" for part, names in (("self_attn", allowed[:4]), ("mlp", allowed[4:])) for name in names}  # fmt: skip
    for name, module in base.named_modules():
        short = ".".join(name.split(".")[-2:])
        if hasattr(module, "base_layer") and short not in linears:
            return f"the adapter changes {name}"
        if short in linears and type(getattr(module, "base_layer", module)) is not nn.Linear:
            return f"{name} is no plain linear layer"
        if short in linears and getattr(module, "lora_variant", None):
            return f"{name} carries another kind of adapter than plain LoRA"
    heads = (base.model.embed_tokens, base.lm_head)
    if type(heads[0]) is not nn.Embedding or type(heads[1]) is not nn.Linear:
        return "the adapter changes the embedding or the head"
    return None


@torch.inference_mode()
def lay_out(model, adapter: str | None = None) -> Weights:
    """Copy a model's weights, with one of its adapters (None: without any).

    Args:
        model: what :func:`unsupported` has no objection to, plain or in a PeftModel.
        adapter: name of an adapter that the PeftModel holds.
    """
    base = plain_model(model)
    config, decoder = base.config, base.model
    head_dim = decoder.layers[0].self_attn.head_dim
    context = config.max_position_embeddings
    angles = torch.outer(torch.arange(context).float(), decoder.rotary_emb.inv_freq.float())
    return Weights(
        embedding=decoder.embed_tokens.weight.detach(),
        layers=[_layer(layer, head_dim, adapter) for layer in decoder.layers],
        norm=decoder.norm.weight.detach(),
        head=_matrix([(base.lm_head.weight, base.lm_head.bias)]),
        rotation=torch.polar(torch.ones_like(angles), angles),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        eps=config.rms_norm_eps,
        context=context,
    )


def _layer(layer, head_dim: int, adapter: str | None) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    q, k = (
        _pairs_together(*_effective(part, adapter), head_dim)
        for part in (attention.q_proj, attention.k_proj)
    )
    return Layer(
        attention_norm=layer.input_layernorm.weight.detach(),
        qkv=_matrix([q, k, _effective(attention.v_proj, adapter)]),
        attention_out=_matrix([_effective(attention.o_proj, adapter)]),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_matrix([_effective(mlp.gate_proj, adapter), _effective(mlp.up_proj, adapter)]),
        down=_matrix([_effective(mlp.down_proj, adapter)]),
    )


def _effective(linear, adapter: str | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight ``(out, in)`` and bias of a linear layer with its adapter added in."""
    base = getattr(linear, "base_layer", linear)
    weight = base.weight.detach()
    if adapter is not None and adapter in getattr(linear, "lora_A", {}):
        weight = weight + linear.get_delta_weight(adapter)
    return weight, base.bias


def _pairs_together(weight: torch.Tensor, bias: torch.Tensor | None, head_dim: int):
    """Put output ``i`` of each head beside ``i + D / 2``: the two that a position rotates.

    Queries and keys are reordered alike, so their products stay what they were.
    """
    order = torch.arange(head_dim).view(2, -1).t().reshape(-1)
    rows = (torch.arange(0, weight.shape[0], head_dim)[:, None] + order).reshape(-1)
    return weight[rows], None if bias is None else bias[rows]


def _matrix(parts: list[tuple[torch.Tensor, torch.Tensor | None]]) -> Matrix:
    """Stack layers that read the same input, in the memory order that is faster for one row."""
    weight = torch.cat([weight for weight, _ in parts])
    wide = weight.shape[0] > weight.shape[1]
    stacked = weight.t().contiguous() if wide else weight.clone().t()
    if all(bias is None for _, bias in parts):
        return Matrix(stacked, None)
    zeros = [torch.zeros(w.shape[0]) if b is None else b.detach() for w, b in parts]
    return Matrix(stacked, torch.cat(zeros))
