"""The part of the Trainer that saves and goes on: whole checkpoints, exactly the same run after one.

Written over transformers 5.24's ``Trainer._save_checkpoint``, which fills the final folder in place.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from tinyllm import checkpoint
from tinyllm.errors import AlreadyTold, Interrupted, UserError
from tinyllm.faults import storage_problem
from tinyllm.interrupt import NeverStop
from tinyllm.keeper import Keeper
from tinyllm.pickles import weights_only
from tinyllm.random_state import RandomState

PICKLED_ARGUMENTS = "training_args.bin"


class SavingTrainer(Trainer):
    """A Trainer whose checkpoints are complete or absent, and which can be stopped at any moment.

    Attributes:
        identity: what the run is; goes into every manifest.
        stop: tells whether a signal asks for the end.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.identity: dict = {}
        self.stop = NeverStop()
        self.random_state: RandomState | None = None
        self.saved_step, self.unevaluated, self.seconds_before = 0, False, 0.0
        self.add_callback(Keeper(self))

    # saving

    def _save_checkpoint(self, model, trial) -> None:
        """Write ``checkpoint-N`` whole, then delete what is beyond ``save_total_limit``.

        Raises:
            UserError: it cannot be written; the earlier checkpoints stay as they are.
        """
        self.store_flos()
        folder = Path(self._get_output_dir(trial))
        target = folder / f"checkpoint-{self.state.global_step}"
        self._note_best(folder, target)
        scratch = checkpoint.scratch_of(target)
        self._on_every_rank(folder, lambda: self._start(scratch))
        self._on_every_rank(folder, lambda: self._fill(scratch))
        self._on_every_rank(folder, lambda: self._seal(scratch, target))
        self.saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))

    def _start(self, scratch: Path) -> None:
        if self.args.should_save:
            checkpoint.remove_leftovers(scratch.parent)
            scratch.mkdir(parents=True)

    def _fill(self, scratch: Path) -> None:
        """What every rank has to write; the names are those that transformers reads."""
        scratch.mkdir(parents=True, exist_ok=True)
        self.save_model(str(scratch), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(scratch))
            self._save_scaler(str(scratch))
            self._save_rng_state(str(scratch))
        (scratch / self._loss_file()).write_text(json.dumps(self._loss_state()))
        if self.args.should_save:
            self._export_callbacks()
            self.state.save_to_json(str(scratch / checkpoint.TRAINER_STATE))
            # objects of Python that nothing reads, and a pickle can run any code
            (scratch / PICKLED_ARGUMENTS).unlink(missing_ok=True)

    def _seal(self, scratch: Path, target: Path) -> None:
        if not self.args.should_save:
            return
        about = {"step": self.state.global_step, "processes": self.args.world_size,
                 "ranks": self._ranks_here(), "identity": self.identity}  # fmt: skip
        self._require_random_states(scratch, about)
        checkpoint.seal(scratch, target, about)
        best = self.state.best_model_checkpoint
        keep = {target.name} | ({Path(best).name} if best else set())
        checkpoint.prune(target.parent, self.args.save_total_limit, keep)

    def _ranks_here(self) -> list[int]:
        """The ranks that write into the same folder as this one."""
        if not self.args.save_on_each_node:
            return list(range(self.args.world_size))
        first = self.args.process_index - self.args.local_process_index
        return list(range(first, first + int(os.environ["LOCAL_WORLD_SIZE"])))

    def _require_random_states(self, scratch: Path, about: dict) -> None:
        if self.args.save_only_model:
            return
        for name in checkpoint.rng_files(about["ranks"], about["processes"]):
            if not (scratch / name).is_file():
                raise UserError(
                    f"{scratch.parent}: not every process writes into this folder ({name} is "
                    "missing); give a folder that all machines share, or --save_on_each_node True"
                )

    def _note_best(self, folder: Path, target: Path) -> None:
        """Remember where the best checkpoint is, by the name that it will have."""
        if not self.state.best_global_step:
            return
        best = folder / f"checkpoint-{self.state.best_global_step}"
        if best == target or best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _export_callbacks(self) -> None:
        """Let callbacks that have a state write it into the trainer's, as transformers does."""
        exportable = [c for c in [*self.callback_handler.callbacks, self.control]
                      if isinstance(c, ExportableState)]  # fmt: skip
        self.state.stateful_callbacks = {}
        for one in exportable:
            self.state.stateful_callbacks.setdefault(type(one).__name__, []).append(one.state())

    def _on_every_rank(self, folder: Path, work) -> None:
        """Do a part of the saving; when it fails on one rank, it fails on all, with one line."""
        failure = None
        try:
            work()
        except Exception as error:
            failure = error
        failures = self._sum_over_ranks(float(failure is not None))
        if not failures:
            return
        if self.args.should_save:
            checkpoint.remove_leftovers(folder)
        if failure is None:
            raise AlreadyTold("another process could not save its part of the checkpoint")
        if (reason := storage_problem(failure)) is None:
            raise failure
        raise UserError(
            f"step {self.state.global_step}: the checkpoint cannot be written to {folder}: {reason}; "
            f"{self._last_good(folder)}; make room, and run the same command again"
        ) from failure

    def _last_good(self, folder: Path) -> str:
        found = checkpoint.find(folder)
        return f"{found[0].path.name} is intact" if found else "there is no earlier checkpoint"

    def _last_good_here(self) -> str:
        return self._last_good(Path(self.args.output_dir))

    def _sum_over_ranks(self, value: float) -> float:
        if self.accelerator.num_processes == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.args.device)
        return self.accelerator.reduce(tensor, "sum").item()

    # going on

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        with weights_only(with_deepspeed=self.is_deepspeed_enabled):
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )

    def _init_training_state(self, *args) -> tuple[int, int]:
        """Find the best checkpoint again also when the run folder has been moved."""
        where = super()._init_training_state(*args)
        self._resumed_from = args[3]
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and best.is_dir():
            self.state.best_model_checkpoint = str(best)
        return where

    def _loss_file(self) -> str:
        rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        return f"loss_state{rank}.json"

    def _loss_state(self) -> dict:
        """What the Trainer itself forgets: the sums of losses, and the time spent."""
        return {
            "since_log": self._tr_loss.item(), "total": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "seconds": self.seconds_before + time.time() - self._started,
            "unevaluated": self.unevaluated,
        }  # fmt: skip

    def _restore_loss_state(self) -> None:
        """Go on with the sums, so that logs and results are those of an uninterrupted run."""
        if self._resumed_from is None:
            return
        path = Path(self._resumed_from) / self._loss_file()
        stored = json.loads(path.read_text(encoding="utf-8"))
        self._tr_loss += stored["since_log"]
        self._total_loss_scalar = stored["total"]
        self._globalstep_last_logged = stored["last_logged"]
        self._initial_global_step, self.saved_step = 0, self.state.global_step
        self.seconds_before = stored["seconds"]
        if stored["unevaluated"]:
            metrics = self._evaluate(None, None)
            self._determine_best_metric(metrics, None)
            self._note_best(Path(self.args.output_dir), Path(self._resumed_from))

    def _run_epoch(self, *args, **kwargs) -> None:
        """Train nothing when a callback has asked for the end before the first step."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial, num_train_samples, start_time):
        return super()._finalize_training(
            trial, num_train_samples, start_time - self.seconds_before
        )

    # stopping

    def stop_wanted(self) -> bool:
        """Whether a signal has come, on any rank; every rank has to ask."""
        return self._sum_over_ranks(float(self.stop.wanted)) > 0

    def stop_now(self, in_evaluation: bool = False) -> None:
        """In one process: end between two pieces of work, with what the last whole step left.

        Raises:
            Interrupted: if a signal has come.
        """
        alone = self.args.world_size == 1 and not self.is_deepspeed_enabled
        if not self.stop.wanted or not alone or self.random_state is None:
            return
        if self.state.global_step == 0:
            raise Interrupted(self.stop.signal, "before the first step was done, nothing is lost")
        self.random_state.restore()
        self.unevaluated = in_evaluation
        target = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.saved_step != self.state.global_step:
            self._save_checkpoint(self.model_wrapped, None)
        raise Interrupted(self.stop.signal, f"at step {self.state.global_step}, saved {target}")

    def is_last_of_epoch(self) -> bool:
        """Whether the step just done ends an epoch."""
        return self.state.global_step % len(self.callback_handler.train_dataloader) == 0
