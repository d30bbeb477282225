"""Starts that move a part of the base's weights into the adapter: PiSSA and OLoRA.

    W = W_rest + s B0 A0        at step 0; training changes A and B, W_rest stays frozen

(PiSSA: Meng et al. 2024, arXiv:2404.02948; OLoRA: Buyukakyuz 2024, arXiv:2406.01775.)  The adapter
that a run leaves belongs beside the untouched W, so its last act is to take the start off again:

    s B A - s B0 A0 = s [B  -B0] [A; A0]        an ordinary LoRA of twice the rank
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tinyllm import run_folder
from tinyllm.errors import UserError
from tinyllm.lora_settings import MOVING_STARTS

CLOSE = (
    1e-4  # of B0 A0's size: what another number of threads changes, and no other machine's start
)
Tensors = dict[str, torch.Tensor]


def remember_start(lora) -> None:
    """Keep A0 and B0, under the names they have in an adapter file, with the model."""
    state = get_peft_model_state_dict(lora, save_embedding_layers=False)
    parts = {k: v for k, v in state.items() if ".lora_A." in k or ".lora_B." in k}
    lora.lora_start = {k: v.detach().clone().contiguous() for k, v in parts.items()}


def keep_start(lora, folder: Path, writes: bool = True) -> None:
    """Keep the start with the run, so that a resumed run takes off what it began with.

    Raises:
        UserError: the run began with another start, as on a machine that computes otherwise.
    """
    start = getattr(lora, "lora_start", None)
    if start is None:
        return
    path = folder / run_folder.LORA_START
    if not path.is_file():
        if writes:
            scratch = path.with_name(f".{path.name}.tmp")
            save_file(start, scratch, metadata={"format": "pt"})
            scratch.replace(path)
        return
    kept = load_file(path)
    if not same_start(kept, start):
        raise UserError(
            f"{path}: the run began with another start than this machine computes, so its "
            "checkpoints do not fit; start anew with --overwrite_output_dir True"
        )
    lora.lora_start = kept


def same_start(one: Tensors, other: Tensors) -> bool:
    """Whether both move the same part of the base: equal B0 A0, whatever the factors' signs."""
    if one.keys() != other.keys():
        return False
    for name in (name for name in one if ".lora_A." in name):
        b = name.replace(".lora_A.", ".lora_B.")
        first, second = one[b] @ one[name], other[b] @ other[name]
        if (first - second).norm() > CLOSE * first.norm():
            return False
    return True


def without_start(weights: Tensors, start: Tensors) -> Tensors:
    """``A, B`` → ``[A; A0], [B -B0]``: what the training has changed, as an ordinary LoRA."""
    plain = dict(weights)
    for name, first in start.items():
        if ".lora_A." in name:
            plain[name] = torch.cat([weights[name], first.to(weights[name])], dim=0)
        else:
            plain[name] = torch.cat([weights[name], -first.to(weights[name])], dim=1)
    return plain


def take_start_off(folder: Path, config: dict, start: Tensors) -> dict:
    """Rewrite the adapter files of a folder as an ordinary LoRA; returns its configuration."""
    weights = load_file(folder / "adapter_model.safetensors")
    plain = {name: t.contiguous() for name, t in without_start(weights, start).items()}
    save_file(plain, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    torch.save(plain, folder / "adapter_model.bin")
    return plain_config(config)


def plain_config(config: dict) -> dict:
    """The adapter's configuration at twice the rank, each layer's scale unchanged."""
    growth = math.sqrt(2) if config.get("use_rslora") else 2  # scale is alpha / sqrt(r), or / r
    twice = {layer: 2 * r for layer, r in (config.get("rank_pattern") or {}).items()}
    alphas = {layer: growth * a for layer, a in (config.get("alpha_pattern") or {}).items()}
    return config | {
        "r": 2 * config["r"],
        "lora_alpha": growth * config["lora_alpha"],
        "rank_pattern": twice,
        "alpha_pattern": alphas,
        "init_lora_weights": True,
    }


def refuse_raw(config: dict, folder: Path) -> None:
    """Raise a UserError for an adapter that fits only a base from which its start was taken.

    peft takes it from the base again when the start can be computed again, which one that is
    drawn at random cannot.
    """
    start = str(config.get("init_lora_weights"))
    if start.startswith(MOVING_STARTS) and "_niter_" in start:
        raise UserError(
            f"{folder}: a checkpoint in the midst of a run with --init_lora_weights {start}, which "
            "fits no base; load the finished run's folder"
        )
