"""In which precision the base is trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from tinyllm.base import pick_dtype, read_json
from tinyllm.errors import UserError
from tinyllm.native_bf16 import cpu_multiplies_bf16
from tinyllm.settings import Settings


def choose_dtype(settings: Settings, say: Callable[[str], None]) -> torch.dtype:
    """Precision of the base's weights; a choice that hangs on the CPU is written into the settings,
    so that a run which is resumed on another machine notices.

    Raises:
        UserError: 16 bits are asked for where a start is taken off the weights.
    """
    base = settings.base
    dtype = weights_dtype(settings)
    on_cpu = settings.training.device.type == "cpu"
    if base.torch_dtype == "auto" and dtype == torch.bfloat16 and on_cpu:
        base.torch_dtype = "bfloat16"
        say(
            "the base stays in bfloat16, as it is stored: this CPU multiplies it in hardware, about "
            "twice as fast (--torch_dtype float32 for the longer way)"
        )
    return dtype


def weights_dtype(settings: Settings) -> torch.dtype:
    """Precision of the base's weights.

    Raises:
        UserError: 16 bits are asked for where a start is taken off the weights.
    """
    name, lora = settings.base.torch_dtype, settings.lora
    if not lora.use_lora:
        return torch.float32  # trained weights are kept in full precision
    if not lora.moves_base_weights:
        if name == "auto" and keeps_bfloat16(settings):
            return torch.bfloat16
        return pick_dtype(name, settings.training.device)
    if name in ("bfloat16", "float16"):
        raise UserError(
            f"--torch_dtype {name} with --init_lora_weights {lora.init_lora_weights}: what that start "
            "leaves of the base would be rounded, and the adapter not fit the base; use float32"
        )
    return torch.float32


def keeps_bfloat16(settings: Settings) -> bool:
    """Whether the base is stored in bfloat16 and this CPU multiplies that in hardware: then it loses
    nothing, and training takes about half the time.
    """
    if settings.training.device.type != "cpu" or settings.base.is_quantised:
        return False
    config = read_json(Path(settings.base.base_model_path) / "config.json")
    stored = config.get("dtype") or config.get("torch_dtype")
    return stored == "bfloat16" and cpu_multiplies_bf16()
