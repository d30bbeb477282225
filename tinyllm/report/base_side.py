"""The model without what was trained: the adapter switched off, or the base loaded again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tinyllm.base import load_base
from tinyllm.lora_settings import BASE_CHANGING_STARTS
from tinyllm.packing_check import choose_packing
from tinyllm.settings import BaseSettings
from tinyllm.vocabulary import fit_vocabulary


@contextmanager
def without_training(model, settings: BaseSettings, tokenizer) -> Iterator:
    """Give the model as it was before the training, for as long as the block lasts."""
    if can_switch_off(model):
        with model.disable_adapter():
            yield model
        return
    first = next(model.parameters())
    attention = None if settings.attn_implementation == "auto" else settings.attn_implementation
    base, _ = load_base(
        settings.base_model_path, first.dtype, first.device, attention, settings.trust_remote_code
    )
    fit_vocabulary(base, tokenizer)  # the rows may spell tokens that were added for this run
    choose_packing(base)
    yield base


def can_switch_off(model) -> bool:
    """Whether the model is a base with an adapter beside it that leaves the base as it was."""
    configs = getattr(model, "peft_config", {})
    if not configs or not hasattr(model, "disable_adapter"):
        return False
    starts = [str(getattr(config, "init_lora_weights", "")).lower() for config in configs.values()]
    return not any(start.startswith(BASE_CHANGING_STARTS) for start in starts)
