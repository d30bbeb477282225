"""The training loop: warm-up, stable rate and decay, with checkpoints, samples and evaluations.

The same command goes on where the last checkpoint stopped: exactly when the corpus is the same, with
a freshly shuffled stream when it changed (the log says which). Runs on a CPU, one GPU or
several processes under `torchrun` / `accelerate launch`; all of them stop after the same step.
"""

import dataclasses
import json
import logging
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinyllm.errors import UserError
from tinyllm.pretrain import checkpoint
from tinyllm.pretrain.run import Run
from tinyllm.pretrain.schedule import fraction_done, rate_factor, seconds_left

log = logging.getLogger(__name__)

PROMPTS = ("今天天气", "从前有", "问：你好，请介绍一下自己。\n答：", "第一条 为了")
PAUSE_FACTOR = 4.0  # a step this many times longer than usual was stopped from outside
STABLE = "stable.pt"  # the checkpoint from which the decay began


class Timer:
    """True once every so many minutes."""

    def __init__(self, minutes: float) -> None:
        self.seconds, self.last = 60 * minutes, time.monotonic()

    def due(self) -> bool:
        """Whether the time has come; restarts the wait when it has."""
        if time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """A list that SIGTERM is written into, instead of ending the process."""
    noted: list[int] = []
    earlier = signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, earlier)


def start_checkpoint(run: Run) -> Path | None:
    """The last checkpoint, or the one named for the decay while that has not begun."""
    path, named = checkpoint.last(run.folder), run.settings.decay_from_checkpoint
    if named and not (path and checkpoint.load(path)["progress"]["decay_start"] >= 0):
        return Path(named)
    return path


def prepare(run: Run) -> None:
    """Resume when there is a checkpoint, and mark where the decay begins."""
    stage, path = run.settings.stage, start_checkpoint(run)
    if path:
        run.restore(path)
    run.check_export()  # now rather than after the training
    if stage == "stable" and run.progress.decay_start >= 0:
        raise UserError(
            f"{path} is in its decay: go on with --stage decay, or put {run.folder / STABLE}, if it is there, "
            f"in place of the step-*.pt files to go back"
        )
    if stage == "decay" and run.progress.decay_start < 0:
        if not path and not run.settings.start_from:
            raise UserError(f"stage decay needs a checkpoint in {run.folder}, or --start_from")
        run.progress.decay_start = run.progress.step
        if path and path != run.folder / STABLE:
            shutil.copyfile(path, run.folder / STABLE)
        log.info("decay: %d steps from step %d", run.settings.decay_steps, run.progress.step)
    log.info("products in %s, %d process(es)", run.precision, run.accelerator.num_processes)
    log.info("decoder layers are %s", "compiled" if run.compiled else "not compiled")
    for source, pieces in run.stream.pieces.items():
        log.info(
            "text %-24s %7d pieces %9d tokens, share %4.1f %%", source, len(pieces),
            sum(map(len, pieces)), 100 * run.stream.shares[source],
        )  # fmt: skip


def train(run: Run) -> None:
    """Train until the stage is complete or the process is asked to end, then save and evaluate."""
    prepare(run)
    settings, progress = run.settings, run.progress
    if fraction_done(settings, progress) >= 1:
        log.info("training: complete at step %d", progress.step)
        return
    save, sample, evaluate = map(
        Timer, (settings.save_minutes, settings.sample_minutes, settings.evaluate_minutes)
    )
    with signals_noted() as stopped:
        pace, first = 0.0, True  # seconds a step, running mean
        while fraction_done(settings, progress) < 1 and not run.anywhere(bool(stopped)):
            started = time.monotonic()
            loss = run.train_step()
            seconds = run.slowest(time.monotonic() - started)
            if first:  # it may have compiled: it tells nothing of the pace, and is not counted
                first = False
            else:
                seconds = min(seconds, PAUSE_FACTOR * pace) if pace else seconds
                progress.seconds += seconds
                pace = 0.9 * pace + 0.1 * seconds if pace else seconds
            if not pace or progress.step % settings.log_steps == 0:
                report(run, loss, pace or seconds)
            if save.due():
                run.save()
            if sample.due():
                log_samples(run)
            if evaluate.due():
                log_evaluation(run)
    run.save()
    if fraction_done(settings, progress) < 1:
        raise UserError("stopped; the same command goes on here")
    log_evaluation(run)
    log_samples(run)


def write_metrics(run: Run, values: dict) -> None:
    """Append one line to metrics.jsonl."""
    if run.accelerator.is_main_process:
        run.folder.mkdir(parents=True, exist_ok=True)
        with (run.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**dataclasses.asdict(run.progress), **values}) + "\n")


def report(run: Run, loss: float, pace: float) -> None:
    """One log line: loss, speed, time left, and how often each text was seen."""
    settings, progress = run.settings, run.progress
    speed = settings.rows_per_step * settings.max_length / pace
    factor, left = rate_factor(settings, progress), seconds_left(settings, progress, pace)
    epochs = " ".join(f"{s[:5]} {e:.2f}" for s, e in run.stream.epochs().items())
    log.info(
        "step %d loss %.4f rate %.3f tokens %.3fM %.0f tokens/s left %.0f min epochs %s",
        progress.step, loss, factor, progress.tokens / 1e6, speed, left / 60, epochs,
    )  # fmt: skip
    write_metrics(run, {"loss": loss, "rate": factor, "tokens_per_second": speed})


def log_samples(run: Run) -> None:
    """Continue each of `PROMPTS`."""
    for prompt in PROMPTS:
        log.info("sample %s", run.sample(prompt))


def log_evaluation(run: Run) -> None:
    """Evaluate, log and record."""
    results = run.evaluate()
    log.info("bits per character at step %d: %s", run.progress.step, results)
    write_metrics(run, {"bits_per_character": results})
