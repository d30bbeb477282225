"""Adapter folder + base → LoRA model; every file is checked before it is trusted."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D

from tinyllm.base import TOKENIZER_FILES, load_base, pick_device, pick_dtype, read_json
from tinyllm.errors import UserError
from tinyllm.lora_start import refuse_raw
from tinyllm.vocabulary import fit_vocabulary

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
BIN = "adapter_model.bin"
KEY_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that has been read: its configuration and its tensors by name."""

    path: Path
    config: dict
    weights: dict[str, torch.Tensor]
    weights_file: str

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.weights.values())

    @property
    def has_effect(self) -> bool:
        """Whether any B matrix differs from zero; a LoRA whose B is zero changes nothing."""
        return any(t.any().item() for name, t in self.weights.items() if "lora_B" in name)


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter folder (``.safetensors`` or ``.bin``) without executing anything in it.

    Raises:
        UserError: the folder, its configuration or its weights are missing or damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{path}: no such adapter folder")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{path}: no {CONFIG}, so this is no adapter folder")
    config = read_json(folder / CONFIG)
    for name in (SAFETENSORS, BIN):
        if (folder / name).is_file():
            return Adapter(folder, config, read_weights(folder / name), name)
    raise UserError(f"{path}: no weights; expected {SAFETENSORS} or {BIN}")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of one file; a ``.bin`` is unpickled with ``weights_only`` alone.

    Raises:
        UserError: the file is damaged, or holds code instead of tensors.
    """
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused, it holds more than tensors (a pickle can run any code); "
            "get the adapter as .safetensors from someone you trust"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: the file is damaged or cut short; copy or train it again"
        ) from error
    if not isinstance(weights, dict) or not all(torch.is_tensor(t) for t in weights.values()):
        raise UserError(f"{path}: expected tensors by name, got something else")
    return weights


def check_fits(adapter: Adapter, model) -> None:
    """Raise a UserError when the adapter was made for a base of another shape."""
    modules = dict(model.named_modules())
    for name, tensor in adapter.weights.items():
        layer, _, part = name.removeprefix(KEY_PREFIX).partition(".lora_")
        if part not in ("A.weight", "B.weight"):
            continue
        module = modules.get(layer)
        sizes = layer_sizes(module)
        if sizes is None:
            raise UserError(
                f"{adapter.path}: made for another base: it adapts {layer}, which this base has not"
            )
        size, side = (sizes[0], "inputs") if part == "A.weight" else (sizes[1], "outputs")
        got = tensor.shape[1] if part == "A.weight" else tensor.shape[0]
        if got != size:
            raise UserError(
                f"{adapter.path}: made for another base: its {layer} has {got} {side}, "
                f"this base's {size}"
            )


def layer_sizes(module) -> tuple[int, int] | None:
    """``(in, out)`` of a layer that LoRA can adapt; None for any other."""
    if isinstance(module, Conv1D):  # GPT-2's linear layer: its weight is (in, out)
        return tuple(module.weight.shape)
    return (module.in_features, module.out_features) if hasattr(module, "in_features") else None


def attach_adapter(model, adapter: Adapter, is_trainable: bool = False) -> PeftModel:
    """Put an adapter on a base, as a PeftModel.

    Raises:
        UserError: the adapter does not fit the base, or lacks tensors that its config promises.
    """
    refuse_raw(adapter.config, adapter.path)
    check_fits(adapter, model)
    try:
        lora = PeftModel.from_pretrained(model, str(adapter.path), is_trainable=is_trainable)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{adapter.path}: peft cannot load it: {reason}") from error
    expected = {n.replace(".default", "") for n, _ in lora.named_parameters() if ".lora_" in n}
    expected = {n.replace("magnitude_vector.weight", "magnitude_vector") for n in expected}  # DoRA
    missing = sorted(expected - adapter.weights.keys())
    if missing:
        raise UserError(
            f"{adapter.path}: {len(missing)} of {len(expected)} tensors are missing, "
            f"first {missing[0]}"
        )
    return lora


def load_adapter_on_base(
    base_model_path: str | Path,
    lora_model_path: str | Path,
    device: str = "auto",
    torch_dtype: str = "auto",
    is_trainable: bool = False,
    trust_remote_code: bool = False,
):
    """Load a base with an adapter beside it.

    Returns:
        ``(PeftModel, tokenizer)``
    """
    adapter = read_adapter(lora_model_path)
    where = pick_device(device)
    model, tokenizer = load_base(
        base_model_path, pick_dtype(torch_dtype, where), trust_remote_code=trust_remote_code
    )
    if any((adapter.path / name).is_file() for name in TOKENIZER_FILES[:2]):
        tokenizer = AutoTokenizer.from_pretrained(adapter.path, trust_remote_code=trust_remote_code)
        fit_vocabulary(model, tokenizer)
    lora = attach_adapter(model, adapter, is_trainable).to(where)
    return lora.train(is_trainable), tokenizer


def merge(lora: PeftModel, dtype: torch.dtype | None = None):
    """Merge an adapter into its base in float32 and cast last.

    Rounding once at the end keeps the merged model closest to the adapter (peft issue 1836).

    Raises:
        UserError: the merged weights hold NaN or infinity.
    """
    dtype = dtype or next(lora.get_base_model().parameters()).dtype
    try:
        merged = lora.to(torch.float32).merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"the adapter cannot be merged: {error}") from error
    return merged.to(dtype).eval()
