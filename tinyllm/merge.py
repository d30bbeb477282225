"""LoRA model → plain model: the adapter added to the weights in float32, cast last."""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from tinyllm.errors import UserError


def merge(lora: PeftModel, dtype: torch.dtype | None = None):
    """Merge an adapter into its base in float32 and cast last.

    Rounding once at the end keeps the merged model closest to the adapter (peft issue 1836).

    Raises:
        UserError: the base's weights are quantised, this kind of adapter cannot be merged, or the
            merged weights hold NaN or infinity.
    """
    dtype = dtype or next(lora.get_base_model().parameters()).dtype
    refuse_quantised(lora)
    if not hasattr(lora.base_model, "merge_and_unload"):
        kind = lora.active_peft_config.peft_type.value
        raise UserError(f"an adapter of kind {kind} cannot be merged; load it beside its base")
    cast_weights(lora, torch.float32)
    give_adapted_head_its_own_weight(lora.get_base_model())
    try:
        merged = lora.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, AttributeError, TypeError) as error:
        raise UserError(f"the adapter cannot be merged: {error}") from error
    keep_untied_if_they_differ(merged)
    return cast_weights(merged, dtype).eval()


def cast_weights(model, dtype: torch.dtype):
    """Cast the parameters alone.

    ``model.to(dtype)`` would round the rotary frequencies as well, which transformers keeps in
    float32 when it loads a model; the merged model would then differ from itself reloaded.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def refuse_quantised(model) -> None:
    """Raise a UserError when a base holds quantised weights: a merge would round them anew."""
    kind = quantisation_of(model)
    if kind:
        raise UserError(
            f"the base's weights are quantised ({kind}): merging into them would round the adapter "
            "away; merge into the full-precision base and quantise the result "
            "(load_lora_model(..., quantize=...)), or load without merging"
        )


def quantisation_of(model) -> str | None:
    """What kind of quantised weights a model holds, None for plain ones."""
    config = getattr(model.config, "quantization_config", None)
    if config is not None and not getattr(config, "dequantize", False):
        method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
        return str(getattr(method, "value", method))
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and not _is_plain(weight):
            return f"{type(weight).__name__} in {type(module).__name__}"
    return None


def _is_plain(weight: torch.Tensor) -> bool:
    return weight.is_floating_point() and type(weight.data) in (torch.Tensor, nn.Parameter)


def give_adapted_head_its_own_weight(model) -> None:
    """Part a tied output layer from the embedding before an adapter on one of them is merged.

    Both are one tensor: adding the adapter of one would change the other.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or not any(isinstance(m, BaseTunerLayer) for m in (embedding, head)):
        return
    layer = getattr(head, "base_layer", head)
    if layer.weight is getattr(embedding, "base_layer", embedding).weight:
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


def _equal(one: nn.Module, other: nn.Module) -> bool:
    return one.weight.shape == other.weight.shape and torch.equal(one.weight, other.weight)


def keep_untied_if_they_differ(model) -> None:
    """Say in the configuration that the output layer is no longer the embedding.

    Otherwise loading the saved model would tie them again and lose what was trained.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight.data_ptr() == embedding.weight.data_ptr():
        return
    if model.config.get_text_config().tie_word_embeddings and _equal(head, embedding):
        head.weight = embedding.weight  # both were given the same update: one tensor again
    else:
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
