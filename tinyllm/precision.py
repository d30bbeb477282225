"""In which precision the base is trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tinyllm import ranks
from tinyllm.base import pick_dtype, read_json
from tinyllm.errors import UserError
from tinyllm.native_bf16 import cpu_multiplies_bf16
from tinyllm.settings import Settings


def choose_dtype(settings: Settings, say: Callable[[str], None]) -> torch.dtype:
    """Precision of the base's weights; on CPUs, where ``auto`` hangs on the machine, what it came to is
    written into the settings, so that a run which is resumed on another machine notices.

    Raises:
        UserError: 16 bits are asked for where a start is taken off the weights, or the CPUs of several
            nodes would choose differently.
    """
    base = settings.base
    dtype = weights_dtype(settings)
    if base.torch_dtype != "auto" or settings.training.device.type != "cpu":
        return dtype
    if len(set(chosen := ranks.gather(str(dtype)))) > 1:
        raise UserError(
            f"--torch_dtype auto comes to {', '.join(chosen)} on the processes in their order: "
            "give --torch_dtype float32 (PRECISION=fp32)"
        )
    base.torch_dtype = str(dtype).removeprefix("torch.")
    if dtype == torch.bfloat16:
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
    """Whether the base is stored in bfloat16 and this CPU multiplies that in hardware: then its weights
    lose nothing, and training takes about half the time.
    """
    if settings.training.device.type != "cpu" or settings.base.is_quantised:
        return False
    # oneDNN has the fast products; a PyTorch built without it would be slower than in float32
    fast = cpu_multiplies_bf16() and torch.backends.mkldnn.is_available()
    return fast and is_stored_in_bfloat16(Path(settings.base.base_model_path))


def is_stored_in_bfloat16(folder: Path) -> bool:
    """What the configuration says of a base's weights, and, of one safetensors file, the file."""
    config = read_json(folder / "config.json")
    if (config.get("dtype") or config.get("torch_dtype")) != "bfloat16":
        return False
    if not (file := folder / "model.safetensors").is_file():
        return True
    try:
        with safe_open(file, "pt") as weights:
            names = weights.keys()
            return all(weights.get_slice(name).get_dtype() == "BF16" for name in names)
    except SafetensorError:
        return True  # loading it says what is wrong


def same_name(settings: dict, device: str) -> dict:
    """Recorded settings with ``auto`` written as what it meant: until it was recorded resolved, a base
    on a CPU was always in float32.
    """
    old = settings.get("torch_dtype") == "auto" and device == "cpu"
    return settings | {"torch_dtype": "float32"} if old else settings
