"""``--verify_resume True``: the user's own run, a few steps of it, straight and interrupted, compared.

Straight: six steps, with a checkpoint after three.  Interrupted: everything built anew, the random
numbers somewhere else, and three more steps from that checkpoint.  Both must end in the same bits.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from tinyllm import checkpoint
from tinyllm.data import Data
from tinyllm.errors import UserError
from tinyllm.faults import one_line_for_faults
from tinyllm.interrupt import NeverStop
from tinyllm.ranks import is_first
from tinyllm.run_folder import clear_if_unwritable
from tinyllm.settings import Settings

STEPS = 6
DIFFERENT = 1  # the exit code


def verify_resume(settings: Settings, data: Data, max_length: int) -> int:
    """Train straight and interrupted, print the verdict; returns the exit code.

    The run folder is not touched: all happens in a folder beside it, which is removed afterwards.

    Raises:
        UserError: it cannot be tried.
    """
    folder = settings.output_dir.with_name(f".{settings.output_dir.name}.verify-resume")
    try:
        straight = _train(settings, data, max_length, folder / "straight", None)
        saved = folder / "straight" / f"checkpoint-{STEPS // 2}"
        if reason := checkpoint.problem(saved):
            raise UserError(f"--verify_resume: the checkpoint cannot be used: {reason}")
        _scramble_random_numbers()
        resumed = _train(settings, data, max_length, folder / "resumed", saved)
    finally:
        if is_first():
            shutil.rmtree(folder, ignore_errors=True)
    differences = compare(straight, resumed)
    if is_first():
        print(_verdict(straight, differences), file=sys.stderr, flush=True)
    return DIFFERENT if differences else 0


def _train(
    settings: Settings, data: Data, max_length: int, folder: Path, resume_from: Path | None
) -> dict[str, torch.Tensor]:
    """Build everything anew, train to the last step; returns all that training has changed."""
    from tinyllm import sft

    settings = dataclasses.replace(
        settings, training=_short(settings.training, folder),
        run=dataclasses.replace(settings.run, early_stopping_patience=0, eval_replies=0),
    )  # fmt: skip
    with clear_if_unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with one_line_for_faults(folder, settings.training, NeverStop()):
        model, tokenizer, _ = sft.load_model(settings)
        model = sft.prepare_model(settings, model)
        trainer = sft.build_trainer(settings, model, tokenizer, data, max_length)
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    return _state(trainer)


def _short(args, folder: Path):
    """The user's training settings for a few steps, with a checkpoint in their middle."""
    args = copy.copy(args)
    args.output_dir, args.max_steps, args.logging_steps = str(folder), STEPS, 1
    args.save_strategy, args.save_steps, args.save_only_model = (
        SaveStrategy.STEPS,
        STEPS // 2,
        False,
    )
    args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
    args.save_total_limit, args.push_to_hub, args.report_to = None, False, []
    return args


def _state(trainer) -> dict[str, torch.Tensor]:
    """Trained weights, optimizer state, and the loss of every step."""
    state = {n: p.detach().cpu().clone() for n, p in trainer.model.named_parameters()
             if p.requires_grad}  # fmt: skip
    for number, entries in trainer.optimizer.state_dict().get("state", {}).items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                state[f"optimizer {name} {number}"] = value.cpu().clone()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            state[f"loss of step {entry['step']}"] = torch.tensor(entry["loss"])
    return state


def compare(straight: dict, resumed: dict) -> list[str]:
    """What is not the same bit by bit, with the largest difference."""
    found = []
    for name in sorted(straight.keys() | resumed.keys()):
        if name not in straight or name not in resumed:
            found.append(f"{name}: only there {'straight' if name in straight else 'resumed'}")
            continue
        one, other = straight[name], resumed[name]
        if one.shape != other.shape or not torch.equal(one, other):
            far = (
                (one.double() - other.double()).abs().max().item()
                if one.shape == other.shape
                else 0
            )
            found.append(f"{name}: up to {far:.3g} apart")
    return found


def _verdict(straight: dict, differences: list[str]) -> str:
    half = STEPS // 2
    if not differences:
        return (
            f"verify_resume: the same. {STEPS} steps straight, and {half} + {half} steps with everything "
            f"built anew in between, agree bit by bit in all {len(straight)} weights, optimizer "
            "states and losses"
        )
    return (
        f"verify_resume: DIFFERENT. {len(differences)} of {len(straight)} weights, optimizer states and "
        f"losses differ between {STEPS} steps straight and {half} + {half}; first {differences[0]}"
    )


def _scramble_random_numbers() -> None:
    """As a new process would find them: somewhere else."""
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
