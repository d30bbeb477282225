"""What a run says while it trains: one bar, one line an evaluation, replies, one log file."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from tqdm import tqdm
from transformers import TrainerCallback

from tinyllm.json_lines import append_line, read_lines, write_lines
from tinyllm.lora import without_idle_adapter
from tinyllm.report.replies import Question, reply_to_all
from tinyllm.sharded import is_sharded

REPLY_TOKENS = 48


class Progress(TrainerCallback):
    """A progress bar with losses, learning rate, speed and remaining time, on rank 0.

    Args:
        tokens_per_step: mean number of tokens of an optimizer step, over all processes.
    """

    def __init__(self, tokens_per_step: float = 0.0) -> None:
        self.bar: tqdm | None = None
        self.tokens_per_step = tokens_per_step
        self.numbers: dict[str, str] = {}
        self.busy, self.steps, self.begun = 0.0, 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero and not args.disable_tqdm:
            # a log file gets a line now and then, a terminal a living bar
            pace = 0.2 if sys.stderr.isatty() else 15
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step",
                mininterval=pace, maxinterval=pace, dynamic_ncols=True,
            )  # fmt: skip

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.busy += time.perf_counter() - self.begun  # evaluations and checkpoints not counted
        self.steps += 1
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.bar is None or not logs or "loss" not in logs:
            return
        self.numbers |= {
            "loss": f"{float(logs['loss']):.3f}", "lr": f"{float(logs['learning_rate']):.1e}",
        }  # fmt: skip
        if self.tokens_per_step and self.busy:
            self.numbers["tok/s"] = f"{self.tokens_per_step * self.steps / self.busy:,.0f}"
            self.busy, self.steps = 0.0, 0
        self.bar.set_postfix(self.numbers, refresh=False)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        if self.bar is not None and metrics and "eval_loss" in metrics:
            self.numbers["held-out"] = f"{metrics['eval_loss']:.3f}"
            self.bar.set_postfix(self.numbers, refresh=False)
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
            append_line(self.path, state.log_history[-1])


class EvaluateBefore(TrainerCallback):
    """The held-out loss before training; with ZeRO-3 only the engine can compute one."""

    def __init__(self, trainer, known: float | None) -> None:
        self.trainer, self.loss = trainer, known

    def evaluate(self) -> None:
        """Evaluate now, or as soon as there is an engine."""
        if is_sharded(self.trainer.args):
            self.trainer.add_callback(self)
        else:
            with without_idle_adapter(self.trainer.model):
                self._evaluate()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._evaluate()

    def _evaluate(self) -> None:
        self.loss = self.trainer.evaluate()["eval_loss"]
        if self.trainer.is_world_process_zero():
            print(f"before training: held-out loss {self.loss:.4f}", file=sys.stderr, flush=True)


class EvalReplies(TrainerCallback):
    """Answers the same few questions at every evaluation, on rank 0: to the screen and to a file.

    Args:
        path: gets one JSON line a reply; lines of steps that are trained again are taken out.
    """

    def __init__(self, path: Path, questions: list[Question], chat_format) -> None:
        self.path, self.questions, self.chat_format = path, questions, chat_format

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero or not self.path.is_file():
            return
        # the replies of step 0 were given a moment ago, or stand in the file already
        kept = [line for line in read_lines(self.path) if line["step"] <= state.global_step]
        write_lines(self.path, list({(e["step"], e["question"]): e for e in kept}.values()))

    def on_evaluate(self, args, state, control, model=None, processing_class=None, **kw) -> None:
        if not state.is_world_process_zero or not self.questions:
            return
        was_training = model.training
        model.eval()
        replies = reply_to_all(
            model, processing_class, self.chat_format, self.questions, REPLY_TOKENS
        )
        model.train(was_training)
        for question, reply in zip(self.questions, replies, strict=True):
            append_line(self.path, {"step": state.global_step, "question": question.text, **reply})
            end = "" if reply["stopped"] else " ..."
            tqdm.write(f"  {question.text} → {reply['text']}{end}", file=sys.stderr)


class EarlyStopping(TrainerCallback):
    """Stops when the held-out loss has not become better for some evaluations.

    It looks at the logged history alone, so that a resumed run stops where an uninterrupted one does.
    """

    def __init__(self, patience: int, threshold: float) -> None:
        self.patience, self.threshold = patience, threshold

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """A run that had stopped when it was killed stays stopped."""
        self.on_evaluate(args, state, control)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        losses = [e["eval_loss"] for e in state.log_history if "eval_loss" in e and e["step"] > 0]
        waited = evaluations_without_gain(losses, self.threshold)
        if losses and waited >= self.patience:
            control.should_training_stop = True
            if state.is_world_process_zero and state.global_step < state.max_steps:
                tqdm.write(
                    f"stopped early at step {state.global_step}: no better held-out loss for "
                    f"{waited} evaluations (best {min(losses):.4f})", file=sys.stderr,
                )  # fmt: skip


def evaluations_without_gain(losses: list[float], threshold: float) -> int:
    """How many evaluations lie behind the last one that was better by more than ``threshold``."""
    best, waited = float("inf"), 0
    for loss in losses:
        if loss < best - threshold:
            best, waited = loss, 0
        else:
            waited += 1
    return waited


class Lineage(TrainerCallback):
    """Notes each start of the training: when, and from which step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            append_line(self.path, {"started": now, "after_step": state.global_step})
