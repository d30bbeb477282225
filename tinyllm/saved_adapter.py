"""Every adapter that a run writes is opened again and held against the model that was trained.

Sharded engines save empty or half tensors without a word; nobody should learn that while chatting.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainerCallback

from tinyllm.adapter import KEY_PREFIX, Adapter, read_adapter
from tinyllm.errors import UserError
from tinyllm.sharded import num_elements


class CheckSavedAdapter(TrainerCallback):
    """Checks the adapter of each checkpoint as soon as it is written."""

    def on_save(self, args, state, control, model=None, **kwargs) -> None:
        if state.is_world_process_zero and hasattr(model, "peft_config"):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            check_saved_adapter(folder, model, has_learned(state))


def has_learned(state) -> bool:
    """Whether a logged step had a gradient and a learning rate, so that B must have moved."""
    return any(
        entry.get("learning_rate", 0) > 0 and float(entry.get("grad_norm") or 0) > 0
        for entry in state.log_history
    )


def check_saved_adapter(folder: Path, model, learned: bool) -> Adapter:
    """Read an adapter that was just written, and compare it with the model's trained weights.

    Args:
        model: the PeftModel it comes from; its weights may be spread over processes.
        learned: there were steps that must have changed it.

    Raises:
        UserError: tensors are missing, cut short, not finite, not float32, or every B is zero.
    """
    adapter = read_adapter(folder)
    expected = {
        file_name(name): num_elements(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name.startswith(KEY_PREFIX) and ".lora_" in name
    }
    if adapter.config.get("init_lora_weights") is True and getattr(model, "lora_start", None):
        # the start was taken off, which doubled the rank (lora_start.py)
        expected |= {name: 2 * expected[name] for name in model.lora_start}
    for name, size in expected.items():
        tensor = adapter.weights.get(name)
        got = None if tensor is None else tensor.numel()
        if got != size:
            raise UserError(f"{folder}: {name} was saved with {got} of {size} numbers")
    for name, tensor in adapter.weights.items():
        if tensor.dtype != torch.float32 and ".lora_" in name:
            raise UserError(f"{folder}: {name} was saved as {tensor.dtype}, expected float32")
        if not tensor.isfinite().all():
            raise UserError(f"{folder}: {name} holds values that are no numbers")
    if learned and not adapter.has_effect:
        raise UserError(f"{folder}: every B matrix is zero after training, so nothing was learned")
    return adapter


def file_name(parameter: str) -> str:
    """A LoRA parameter's name in an adapter file: without the adapter's own, and DoRA's shorter."""
    return parameter.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")
