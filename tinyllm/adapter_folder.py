"""An adapter folder as files: its configuration and its tensors, read without executing anything."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tinyllm.base import read_json
from tinyllm.errors import UserError

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
BIN = "adapter_model.bin"
# Matrices that start at zero: while they are, the product with their partner is zero too.
START_AT_ZERO = ("lora_B", "lora_embedding_A")
HALF_OF_A_PRODUCT = (*START_AT_ZERO, "lora_A", "lora_embedding_B")


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

    @cached_property
    def zero_products(self) -> list[str]:
        """Names of the matrices that are still the zeros they started with."""
        starts = [n for n in self.weights if any(part in n for part in START_AT_ZERO)]
        return sorted(name for name in starts if not self.weights[name].any().item())

    @property
    def has_effect(self) -> bool:
        """Whether anything differs from the base.

        A LoRA whose every B is zero changes nothing.  Whole layers that were trained along
        (``modules_to_save``), magnitudes (DoRA) and other kinds of adapter count as an effect.
        """
        starts = [n for n in self.weights if any(part in n for part in START_AT_ZERO)]
        others = [n for n in self.weights if not any(part in n for part in HALF_OF_A_PRODUCT)]
        others = [n for n in others if "lora_magnitude_vector" not in n]
        return bool(others) or len(self.zero_products) < len(starts)

    @property
    def broken(self) -> list[str]:
        """Names of the tensors that hold NaN or infinity."""
        return sorted(n for n, t in self.weights.items() if not torch.isfinite(t).all().item())


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


def describe(adapter: Adapter) -> str:
    """What an adapter is, in a few lines."""
    from tinyllm.base_record import read_record

    record, known = read_record(adapter.path), "none (made elsewhere)"
    if record:
        number = len(record["golden"])
        known = f"base weights {record['base']['weights'][:12]}, {number} golden conversations"
    config = adapter.config
    targets = config.get("target_modules")
    targets = targets if isinstance(targets, str) else ", ".join(sorted(targets or []))
    effect = "" if adapter.has_effect else "\nwarning      every B matrix is zero: no effect at all"
    return (
        f"adapter      {adapter.path} ({adapter.weights_file})\n"
        f"trained on   {config.get('base_model_name_or_path')}\n"
        f"kind         {config.get('peft_type')}, r {config.get('r')}, "
        f"alpha {config.get('lora_alpha')}, dropout {config.get('lora_dropout')}\n"
        f"adapts       {targets}\n"
        f"fingerprint  {known}\n"
        f"parameters   {adapter.num_parameters:,} in {len(adapter.weights)} tensors{effect}"
    )
