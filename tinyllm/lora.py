"""Base model → LoRA model, through peft."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tinyllm.errors import UserError
from tinyllm.fast_lora import use_fast_lora
from tinyllm.settings import LoraSettings
from tinyllm.sharded import num_elements


def add_lora(model, settings: LoraSettings):
    """Wrap a base in a fresh LoRA adapter; only the adapter is trainable, in float32.

    Raises:
        UserError: the target modules match no layer of this base.
    """
    check_targets(model, settings.lora_target_modules)
    targets = settings.lora_target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )
    if settings.fast_lora:
        use_fast_lora(config)
    lora = get_peft_model(model, config)
    for parameter in lora.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return lora


def check_targets(model, targets: list[str]) -> None:
    """Raise a UserError when a target names no linear layer, listing those that exist."""
    if targets == ["all-linear"]:
        return
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if missing:
        available = sorted({name.rsplit(".", 1)[-1] for name in names} - {"lm_head"})
        raise UserError(
            f"--lora_target_modules: no layer of this base is called {', '.join(missing)}; "
            f"it has {', '.join(available)}"
        )


def count_parameters(model) -> tuple[int, int]:
    """``(trainable, total)`` parameters of a model."""
    sizes = [(num_elements(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)
