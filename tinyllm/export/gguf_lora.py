"""Adapter → a GGUF LoRA, which llama.cpp applies to the GGUF file of the base (--lora FILE)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from tinyllm.adapter import attach_adapter, read_adapter
from tinyllm.base import load_base
from tinyllm.base_record import verify_base
from tinyllm.errors import UserError
from tinyllm.export.gguf_names import architecture_of, gguf_name, gguf_package, reorder_heads
from tinyllm.export.source import Source, check_target
from tinyllm.whole_folder import whole_folder

KEY = re.compile(r"base_model\.model\.(model\.layers\..+)\.lora_([AB])\.weight")


def export_gguf_lora(source: Source, target: Path) -> Path:
    """Write a folder with the adapter as a GGUF LoRA.

    Returns:
        Path of the ``.gguf`` file, of a few megabytes; the base is not in it.

    Raises:
        UserError: the adapter does more than plain LoRA on the layers' projections.
    """
    gguf_package()
    check_target(target)
    adapter = read_adapter(source.adapter)
    model, tokenizer = load_base(source.base, trust_remote_code=source.trust_remote_code)
    config = model.config
    verify_base(adapter.path, source.base, tokenizer, tokenizer, source.force)
    lora = attach_adapter(model, adapter, force=source.force)
    alpha = alpha_of(lora, adapter)
    name = f"{target.name}-lora.gguf"
    with whole_folder(target) as scratch:
        write_gguf_lora(adapter.weights, config, alpha, scratch / name)
    return target / name


def alpha_of(lora, adapter) -> float:
    """The alpha for which llama.cpp's scale, alpha / r, is the adapter's own.

    Raises:
        UserError: layers have different scales, or it is no plain LoRA.
    """
    settings = adapter.config
    unusual = [n for n in ("use_dora", "lora_bias") if settings.get(n)]
    if settings.get("peft_type") != "LORA" or unusual:
        raise UserError(
            f"{adapter.path}: {', '.join(unusual) or settings.get('peft_type')} has no place in a "
            "GGUF LoRA; merge it (--export gguf)"
        )
    alphas = {
        round(module.scaling["default"] * module.r["default"], 6)
        for module in lora.modules()
        if isinstance(getattr(module, "scaling", None), dict) and "default" in module.scaling
    }
    if len(alphas) != 1:
        raise UserError(f"{adapter.path}: layers with other scales; merge it (--export gguf)")
    return alphas.pop()


def write_gguf_lora(weights: dict, config, alpha: float, path: Path) -> None:
    """Write the A ``(r, in)`` and B ``(out, r)`` matrices of every layer, in float32."""
    gguf, architecture = gguf_package(), architecture_of(config)
    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for key, tensor in sorted(weights.items()):
            layer, half = _place(key, architecture)
            rows = tensor.float()
            if half == "B":  # its rows are the projection's outputs
                rows = reorder_heads(layer, rows, config, architecture)
            place = gguf_name(f"{layer}.weight", architecture)
            writer.add_tensor(f"{place}.lora_{half.lower()}", np.ascontiguousarray(rows.numpy()))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _place(key: str, architecture) -> tuple[str, str]:
    found = KEY.fullmatch(key)
    if found is None or gguf_name(f"{found[1]}.weight", architecture) is None:
        raise UserError(f"{key} has no place in a GGUF LoRA; merge the adapter (--export gguf)")
    return found[1], found[2]
