"""Weights in 8 or 4 bits for inference, through bitsandbytes.

int8 is LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339): a scale for each row of a weight, and
activations rounded as they come.  int4 is NF4 (Dettmers et al. 2023, arXiv:2305.14314): 16 levels, a
scale for each 64 weights.  Only the linear layers inside the blocks are quantised; embeddings, the
output layer and adapters stay as they are.  ``benchmarks/quantize_cost.py`` measures what it costs.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from tinyllm.errors import UserError
from tinyllm.merge import quantisation_of

KINDS = ("int8", "int4")
REQUIREMENTS = "requirement-quant.txt"


@torch.no_grad()
def quantize(model, kind: str):
    """Quantise the linear layers of a model in place, for inference.

    Args:
        model: a plain model, or a PeftModel (then the base under the adapter).
        kind: ``int8`` or ``int4``.

    Returns:
        The same model, frozen and in evaluation mode.

    Raises:
        UserError: unknown kind, bitsandbytes is missing, or there is nothing to quantise.
    """
    if kind not in KINDS:
        raise UserError(f"--quantize {kind}: expected one of {', '.join(KINDS)}")
    found = quantisation_of(model)
    if found:
        raise UserError(f"--quantize {kind}: the base's weights are quantised already ({found})")
    layers = linear_layers(model)
    if not layers:
        raise UserError(f"--quantize {kind}: this model has no linear layers to quantise")
    bitsandbytes = bitsandbytes_package()
    make = {"int8": int8_layer, "int4": int4_layer}[kind]
    for name, layer in layers.items():
        parent, _, part = name.rpartition(".")
        setattr(model.get_submodule(parent), part, make(bitsandbytes, layer))
    return model.requires_grad_(False).eval()


def linear_layers(model) -> dict[str, nn.Linear]:
    """The linear layers inside the blocks, by name; under an adapter that is its base layer."""
    head = model.get_output_embeddings()
    heads = {id(head), id(getattr(head, "base_layer", None))}
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and id(module) not in heads and ".lora_" not in name
    }


def int8_layer(bitsandbytes, layer: nn.Linear) -> nn.Module:
    """The layer with its weight in 8 bits."""
    new = bitsandbytes.nn.Linear8bitLt(
        layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False
    )
    new.weight = bitsandbytes.nn.Int8Params(
        layer.weight.data, requires_grad=False, has_fp16_weights=False
    )
    return _finish(new, layer)


def int4_layer(bitsandbytes, layer: nn.Linear) -> nn.Module:
    """The layer with its weight in 4 bits (NF4)."""
    new = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, quant_type="nf4"
    )
    new.weight = bitsandbytes.nn.Params4bit(
        layer.weight.data, requires_grad=False, quant_type="nf4"
    )
    return _finish(new, layer)


def _finish(new: nn.Module, layer: nn.Linear) -> nn.Module:
    new.bias = layer.bias
    return new.to(layer.weight.device)  # the weight is rounded as it moves


def bitsandbytes_package():
    """The ``bitsandbytes`` package; a UserError that says how to get it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f"quantised weights need one more package: pip install -r {REQUIREMENTS}"
        ) from error
    # its int8 product works on float16 and says so for every layer of every token
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return bitsandbytes
