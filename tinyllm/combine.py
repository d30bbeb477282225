"""Adapters that are loaded beside one base → one more adapter, their weighted sum.

    dW = w1 s1 B1 A1 + w2 s2 B2 A2 + ...        through peft's add_weighted_adapter

What peft would combine without a word into something else is refused here first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer

from tinyllm.errors import UserError
from tinyllm.lora_settings import BASE_CHANGING_STARTS

# What the result is: the sum itself at the sum of the ranks; the sum rounded to the largest rank;
# A and B added each for itself, which is another update.
KINDS = ("cat", "svd", "linear")
# What peft leaves behind when it combines: everything of an adapter that is not its A and B.
NOT_COMBINED = {
    "use_dora": "DoRA",
    "modules_to_save": "layers trained in full (modules_to_save)",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "adapted parameters (target_parameters)",
    "lora_bias": "a bias (lora_bias)",
}


def combine_adapters(
    model: PeftModel, weights: Mapping[str, float], name: str, kind: str = "cat"
) -> None:
    """Add the weighted sum of loaded adapters as one more adapter; none of them changes.

    Args:
        model: holds the adapters; which one is active stays as it is.
        weights: weight of each adapter, by peft's name of it.
        name: peft's name of the new one.
        kind: ``cat`` (exact, the ranks add up), ``svd`` (the closest update of the largest rank) or
            ``linear`` (sums of the A and of the B; equal ranks only).

    Raises:
        UserError: an adapter is unknown, a weight is no number, or peft cannot combine them.
    """
    check_weights(weights, list(model.peft_config))
    check_kind(kind)
    for one in weights:
        check_combinable(model, one)
    if name in model.peft_config:
        raise UserError(f"there is an adapter {name!r} already; choose another name")
    training = model.training
    with _plain_first(model, next(iter(weights))):
        try:
            model.add_weighted_adapter(
                list(weights), list(weights.values()), name, combination_type=kind,
                svd_full_matrices=False,
            )  # fmt: skip
        except (ValueError, TypeError, RuntimeError) as error:
            _take_away(model, name)
            reason = " ".join(str(error).split())[:200]
            hint = "; cat takes different ranks" if kind == "linear" else ""
            raise UserError(f"peft cannot combine these adapters: {reason}{hint}") from error
    missing = layers_of(model, *weights) - layers_of(model, name)
    if missing:
        _take_away(model, name)
        raise UserError(
            f"peft cannot combine these adapters: it leaves out {len(missing)} layers that only some "
            f"of them adapt, first {min(missing)}"
        )
    if kind == "cat":
        _keep_exact(model, weights, name)
    model.train(training)


def _keep_exact(model: PeftModel, weights: Mapping[str, float], name: str) -> None:
    """Write a ``cat`` anew in the precision of its parts: peft rounds it to that of the base."""
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or name not in layer.lora_A:
            continue
        parts = [one for one in weights if one in layer.lora_A]
        wide = layer.lora_A[parts[0]].weight.dtype
        if layer.lora_A[name].weight.dtype == wide:
            continue
        a = [layer.lora_A[p].weight.data * (weights[p] * layer.scaling[p]) for p in parts]
        b = [layer.lora_B[p].weight.data for p in parts]
        for linear, values in (
            (layer.lora_A[name], torch.cat(a)),
            (layer.lora_B[name], torch.cat(b, 1)),
        ):
            # what a part without this layer would have filled stays zero
            data = torch.zeros(linear.weight.shape, dtype=wide, device=linear.weight.device)
            data[: values.shape[0], : values.shape[1]] = values
            linear.weight.data = data


def check_weights(weights: Mapping[str, float], known: list[str]) -> None:
    """Raise a UserError for adapters that are not there, and for weights that mean nothing."""
    for name, weight in weights.items():
        if name not in known:
            there = ", ".join(known) or "none"
            raise UserError(f"no adapter {name!r} to combine; there is {there}")
        if not math.isfinite(weight):
            raise UserError(f"{name}={weight}: the weight must be a finite number")
    if not any(weights.values()):
        raise UserError("every weight is 0, which is the base alone")


def check_kind(kind: str) -> None:
    """Raise a UserError for a combination type that is not offered."""
    if kind not in KINDS:
        raise UserError(
            f"no combination {kind!r}: cat (exact, the ranks add up), svd (rounded to the largest "
            "rank) or linear (equal ranks only)"
        )


def check_combinable(model: PeftModel, adapter: str, called: str = "") -> None:
    """Raise a UserError for an adapter of which peft would combine only a part.

    Args:
        adapter: peft's name of it.
        called: the user's name of it, for the message.
    """
    config, name = model.peft_config[adapter], called or adapter
    if config.peft_type != PeftType.LORA:
        raise UserError(f"{name}: peft combines LoRA only, this is {config.peft_type.value}")
    for field, what in NOT_COMBINED.items():
        if getattr(config, field, None):
            raise UserError(f"{name}: peft cannot combine it, it has {what} beside A and B")
    if config.bias != "none":
        raise UserError(f"{name}: peft cannot combine it, it has trained biases beside A and B")
    variants = {type(v).__name__ for m in model.modules() for v in _variants(m, adapter)}
    if variants:
        raise UserError(f"{name}: peft cannot combine it, it is another kind: {min(variants)}")
    if str(config.init_lora_weights).lower().startswith(BASE_CHANGING_STARTS):
        raise UserError(
            f"{name}: made with {config.init_lora_weights}, it stands on a base of its own, which "
            "another adapter does not share"
        )


@contextmanager
def _plain_first(model: PeftModel, first: str) -> Iterator[None]:
    """Let peft, which copies the first adapter's configuration, begin with a plain one.

    With rsLoRA it would scale the sum once more by sqrt(r), some starts refuse its rank, and the
    dropout would stay.
    """
    own = model.peft_config[first]
    model.peft_config[first] = replace(
        own, use_rslora=False, init_lora_weights=True, lora_dropout=0.0
    )
    try:
        yield
    finally:
        model.peft_config[first] = own


def layers_of(model: PeftModel, *adapters: str) -> set[str]:
    """Names of the layers that at least one of the adapters changes."""
    return {
        name
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
        and any(one in layer.lora_A or one in layer.lora_embedding_A for one in adapters)
    }


def _variants(module, name: str) -> list:
    """What peft puts in place of plain LoRA in one layer (aLoRA, Arrow, ...)."""
    return [v for one, v in getattr(module, "lora_variant", {}).items() if one == name]


def _take_away(model: PeftModel, name: str) -> None:
    if name in model.peft_config:
        model.delete_adapter(name)
