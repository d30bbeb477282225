"""How large the pieces of an optimizer step are, and how the Trainer counts steps."""

from __future__ import annotations

import copy

import torch

from tinyllm.packed_weights import FILLED
from tinyllm.settings import SftArguments

# Tokens of a micro-batch on a CPU.  Small layers need 1,024 to outweigh the calls around them (12 to
# 30 % faster than 512 at width 384); wider ones gain less, and their activations cost memory (at width 576
# and 30 layers a step of 660 tokens takes 10 % less in one piece, and 120 MiB more).
NARROW_CPU_TOKENS, WIDE_CPU_TOKENS = 1024, 768
NARROW = 512


def most_tokens(args: SftArguments, model, max_length: int) -> int:
    """Most tokens of a micro-batch: MBS x ``max_length``, on a CPU bounded by the width of the layers."""
    asked = args.per_device_train_batch_size * max_length
    if args.device.type != "cpu":
        return asked
    width = getattr(model.config.get_text_config(), "hidden_size", 0)
    return min(asked, NARROW_CPU_TOKENS if width <= NARROW else WIDE_CPU_TOKENS)


def filled_up_to(args: SftArguments, model) -> int:
    """Of what number a packed micro-batch has a multiple of tokens, where oneDNN multiplies; float32 products are
    MKL's.
    """
    in_bf16 = next(model.parameters()).dtype == torch.bfloat16
    return FILLED if args.fill_rows and in_bf16 and args.device.type == "cpu" else 1


def whole_steps(args: SftArguments) -> SftArguments:
    """The settings as the Trainer gets them: one batch is one whole optimizer step."""
    args = copy.copy(args)
    args.per_device_train_batch_size *= args.gradient_accumulation_steps
    args.gradient_accumulation_steps = 1
    args.remove_unused_columns = False
    args.label_names = ["labels"]
    return args
