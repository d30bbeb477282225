"""What has to be noted after every step, so that a run can stop and go on exactly."""

from __future__ import annotations

import time
from pathlib import Path

from transformers import TrainerCallback

from tinyllm.errors import Interrupted
from tinyllm.random_state import RandomState


class Keeper(TrainerCallback):
    """Looks after what is saved, at the moments that the Trainer offers.

    Args:
        trainer: a :class:`tinyllm.saving.SavingTrainer`.
    """

    def __init__(self, trainer) -> None:
        self.trainer, self.stopping = trainer, False

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer._started = time.time()
        self.trainer._restore_loss_state()
        self.trainer.random_state = RandomState()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        trainer = self.trainer
        trainer.random_state = RandomState()
        at_epoch_end = args.eval_strategy == "epoch" and (
            trainer.is_last_of_epoch() or control.should_training_stop
        )
        trainer.unevaluated = at_epoch_end
        if trainer.stop_wanted():
            # a due evaluation may take long: it is made after the run goes on
            self.stopping = True
            trainer.unevaluated = at_epoch_end or control.should_evaluate
            control.should_evaluate, control.should_save = False, True

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self.trainer.unevaluated = False

    def on_save(self, args, state, control, **kwargs) -> None:
        if self.stopping:
            target = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            raise Interrupted(
                self.trainer.stop.signal, f"at step {state.global_step}, saved {target}"
            )
