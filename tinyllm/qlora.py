"""Bases whose linear layers are held in 4 or 8 bits while a LoRA is trained beside them (QLoRA)."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from tinyllm.errors import UserError


def check_quantisation(base, lora) -> None:
    """Raise a UserError, before anything is loaded, when quantisation is asked for and cannot be.

    Args:
        base: the :class:`tinyllm.settings.BaseSettings`.
        lora: the :class:`tinyllm.settings.LoraSettings`.
    """
    if not base.is_quantised:
        return
    flag = "--load_in_4bit" if base.load_in_4bit else "--load_in_8bit"
    if not lora.use_lora:
        raise UserError(f"{flag} needs --use_lora True: quantised weights cannot be trained")
    if lora.moves_base_weights:
        raise UserError(
            f"{flag} with --init_lora_weights {lora.init_lora_weights}: that start changes the base's "
            "weights, which are rounded here; choose one of the two"
        )
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"{flag} needs the package bitsandbytes: pip install -r requirement-quant.txt, then again"
        )


def quantisation_config(base, compute_dtype: torch.dtype):
    """What transformers is told about the base's precision; None for an ordinary base.

    Args:
        compute_dtype: precision of the products; weights are stored in NF4 (with their scales
            quantised again) or in 8-bit integers.
    """
    if not base.is_quantised:
        return None
    from transformers import BitsAndBytesConfig

    if base.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def prepare_quantised(model):
    """Freeze a quantised base and keep its small layers in float32, as peft asks for."""
    from peft import prepare_model_for_kbit_training

    if not getattr(model, "is_quantized", False):
        return model
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
