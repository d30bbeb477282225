"""LoRA+: a learning rate of its own for the B matrices."""

from __future__ import annotations

import torch
from transformers import Trainer

from tinyllm.settings import SftArguments


def loraplus_optimizer(model, args: SftArguments, ratio: float) -> torch.optim.Optimizer:
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): ``args.learning_rate`` for A, ``ratio`` x for B."""
    from peft.optimizers import create_loraplus_optimizer

    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
    options.pop("lr", None)
    return create_loraplus_optimizer(
        model, optimizer_class, lr=args.learning_rate, loraplus_lr_ratio=ratio,
        loraplus_weight_decay=args.weight_decay, loraplus_lr_embedding=args.learning_rate, **options,
    )  # fmt: skip
