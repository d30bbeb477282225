"""What a run says while it trains: one bar, one line an evaluation, one log file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tqdm import tqdm
from transformers import TrainerCallback

from tinyllm.sharded import is_sharded


class Progress(TrainerCallback):
    """A progress bar with loss and learning rate on rank 0."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero and not args.disable_tqdm:
            # a log file gets a line now and then, a terminal a living bar
            pace = 0.2 if sys.stderr.isatty() else 15
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step",
                mininterval=pace, maxinterval=pace, dynamic_ncols=True,
            )  # fmt: skip

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix(
                loss=f"{float(logs['loss']):.3f}", lr=f"{float(logs['learning_rate']):.1e}",
                refresh=False,
            )  # fmt: skip

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        if self.bar is not None and metrics and "eval_loss" in metrics:
            self.bar.write(
                f"epoch {state.epoch:.2f}: held-out loss {metrics['eval_loss']:.4f}",
                file=sys.stderr,
            )

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class LogFile(TrainerCallback):
    """Writes every log event as one JSON line, in full precision."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self.path.touch()

    def on_log(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero and state.log_history:
            with self.path.open("a", encoding="utf-8") as out:
                out.write(json.dumps(state.log_history[-1]) + "\n")


class EvaluateBefore(TrainerCallback):
    """The held-out loss before training; with ZeRO-3 only the engine can compute one."""

    def __init__(self, trainer, known: float | None) -> None:
        self.trainer, self.loss = trainer, known

    def evaluate(self) -> None:
        """Evaluate now, or as soon as there is an engine."""
        if is_sharded(self.trainer.args):
            self.trainer.add_callback(self)
        else:
            self._evaluate()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._evaluate()

    def _evaluate(self) -> None:
        self.loss = self.trainer.evaluate()["eval_loss"]
        if self.trainer.is_world_process_zero():
            print(f"before training: held-out loss {self.loss:.4f}", file=sys.stderr, flush=True)
