"""The training loop: packed rows, WSD schedule, Muon + AdamW, checkpoints, resume.

The same command goes on where the last checkpoint stopped: exactly when the corpus is the same, with
a freshly shuffled stream when it changed (the log says which). Runs on a CPU (float32), one GPU or
several processes under `torchrun` / `accelerate launch` (bfloat16 on GPUs).
"""

import dataclasses
import json
import logging
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tinyllm.pretrain import checkpoint
from tinyllm.pretrain.evaluate import bits_per_character, passages
from tinyllm.pretrain.model import IGNORE_INDEX, PackedLoss, build_model
from tinyllm.pretrain.muon import build_optimizers
from tinyllm.pretrain.packing import Mixture, encode_documents, to_tensors
from tinyllm.pretrain.schedule import Progress, fraction_done, rate_factor, seconds_left
from tinyllm.pretrain.settings import Settings, as_dict

log = logging.getLogger(__name__)

PROMPTS = ("今天天气", "从前有", "用户:你好，请介绍一下自己。\n助手:", "第一条 为了")
SAMPLE_TOKENS = 48
PAUSE_FACTOR = 4.0  # a step this many times longer than usual was stopped from outside


class Run:
    """One training run: model, optimizers, text stream and progress, saved and restored as one."""

    def __init__(
        self,
        settings: Settings,
        tokenizer: PreTrainedTokenizerFast,
        train_texts: dict[str, list[str]],
        heldout_texts: dict[str, list[str]],
        corpus_digest: str,
    ) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self.folder = settings.path("checkpoints")
        self.corpus_digest = corpus_digest
        self.heldout = {
            source: passages(texts, settings.evaluate_passages)
            for source, texts in sorted(heldout_texts.items())
        }
        self.pieces = {
            source: encode_documents(texts, tokenizer, settings.max_length)
            for source, texts in train_texts.items()
        }
        self.accelerator = Accelerator(
            mixed_precision="bf16" if torch.cuda.is_available() else "no"
        )
        self.model: LlamaForCausalLM = build_model(settings, settings.seed)
        self.progress = Progress()
        # Tokens seen per source since the very start, over all changes of the corpus.
        self.seen: dict[str, int] = {}
        self.stream = self.new_stream()
        self.loss = self.accelerator.prepare(PackedLoss(self.model))
        self.optimizers = build_optimizers(
            self.model, settings.muon_lr, settings.adamw_lr, settings.momentum,
            settings.weight_decay,
        )  # fmt: skip
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    def new_stream(self) -> Mixture:
        """A stream for this corpus that begins at the present step."""
        seed = f"{self.settings.seed}/{self.corpus_digest}/{self.progress.step}"
        return Mixture(self.pieces, self.settings.weights, seed)

    def state_dict(self) -> dict:
        """Everything that a restart needs."""
        return {
            "step": self.progress.step,
            "progress": dataclasses.asdict(self.progress),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "stream": self.stream.state_dict(),
            "stream_seed": self.stream.seed,
            "corpus": self.corpus_digest,
            "weights": self.settings.weights,
            "seen": self.seen,
        }

    def save(self) -> None:
        """Write a checkpoint (the main process only)."""
        if self.accelerator.is_main_process:
            path = checkpoint.save(self.folder, self.state_dict(), self.settings.keep_checkpoints)
            log.info("saved %s", path)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = checkpoint.load(path)
        self.model.load_state_dict(state["model"])
        for optimizer, saved, rate in zip(
            self.optimizers, state["optimizers"], self.rates, strict=True
        ):
            optimizer.load_state_dict(saved)
            optimizer.param_groups[0]["lr"] = rate
        self.progress, self.seen = Progress(**state["progress"]), dict(state["seen"])
        log.info("resumed at step %d from %s", self.progress.step, path)
        if (state["corpus"], state["weights"]) == (self.corpus_digest, self.settings.weights):
            self.stream.seed = state["stream_seed"]
            self.stream.load_state_dict(state["stream"])
            log.info("corpus %s is unchanged: the stream goes on exactly", self.corpus_digest)
        else:
            self.stream = self.new_stream()
            log.info("corpus or weights changed: a new stream begins at this step")

    def train_step(self) -> float:
        """One optimizer step; returns the mean loss per token over all processes."""
        settings, accelerator = self.settings, self.accelerator
        rows = self.stream.next_rows(settings.rows_per_step, settings.max_length)
        for row in rows:
            self.progress.tokens += sum(map(len, row))
        batch = to_tensors(rows, settings.max_length, self.tokenizer.pad_token_id)
        num_labels = int((batch["labels"] != IGNORE_INDEX).sum())
        mine = range(accelerator.process_index, len(rows), accelerator.num_processes)
        total = torch.zeros((), device=accelerator.device)
        for start in range(0, len(mine), settings.rows_per_forward):
            index = list(mine[start : start + settings.rows_per_forward])
            part = {k: v[index].to(accelerator.device) for k, v in batch.items()}
            loss = self.loss(**part) / num_labels
            total += loss.detach()
            # DDP averages gradients; the loss is already a share of the whole step.
            accelerator.backward(loss * accelerator.num_processes)
        self.update()
        return accelerator.reduce(total, "sum").item()

    def update(self) -> None:
        """Clip the part that AdamW trains, set the rates, step, clear gradients."""
        factor = rate_factor(self.settings, self.progress)
        adamw = self.optimizers[1]
        torch.nn.utils.clip_grad_norm_(
            adamw.param_groups[0]["params"], self.settings.max_grad_norm
        )
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def evaluate(self) -> dict[str, float]:
        """Bits per character per held-out source."""
        return {
            source: round(bits_per_character(self.model, self.tokenizer, texts), 4)
            for source, texts in self.heldout.items()
        }

    @torch.no_grad()
    def sample(self, prompt: str) -> str:
        """A continuation (temperature 0.7, seeded by the step; the training RNG is untouched)."""
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        with torch.random.fork_rng():
            torch.manual_seed(self.progress.step)
            ids = self.model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                max_new_tokens=SAMPLE_TOKENS, do_sample=True, temperature=0.7, top_k=40,
            )[0]  # fmt: skip
        return self.tokenizer.decode(ids, skip_special_tokens=True).replace("\n", "⏎")


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


def prepare(run: Run) -> None:
    """Resume when there is a checkpoint, and mark where the decay begins."""
    settings = run.settings
    path = checkpoint.last(run.folder)
    explicit = settings.decay_from_checkpoint
    if explicit and not (path and checkpoint.load(path)["progress"]["decay_start"] >= 0):
        path = Path(explicit)
    if path:
        run.restore(path)
    if settings.stage == "decay" and run.progress.decay_start < 0:
        if not path:
            raise ValueError(f"stage decay needs a checkpoint in {run.folder}")
        run.progress.decay_start = run.progress.step
        log.info("decay: %d steps from step %d", settings.decay_steps, run.progress.step)
    for source, pieces in run.stream.pieces.items():
        log.info(
            "text %-24s %7d pieces %9d tokens, share %4.1f %%", source, len(pieces),
            sum(map(len, pieces)), 100 * run.stream.shares[source],
        )  # fmt: skip


def train(run: Run) -> None:
    """Train until the stage is complete, then save and evaluate."""
    settings, progress = run.settings, None
    prepare(run)
    progress = run.progress
    timers = {
        name: Timer(minutes)
        for name, minutes in {
            "save": settings.save_minutes,
            "sample": settings.sample_minutes,
            "evaluate": settings.evaluate_minutes,
        }.items()
    }
    pace, first = 0.0, progress.step
    while fraction_done(settings, progress) < 1:
        started, before = time.monotonic(), dict(run.stream.tokens)
        loss = run.train_step()
        seconds = time.monotonic() - started
        if pace:
            seconds = min(seconds, PAUSE_FACTOR * pace)
        pace = 0.9 * pace + 0.1 * seconds if pace else seconds
        progress.step += 1
        progress.seconds += seconds
        for source, tokens in run.stream.tokens.items():
            run.seen[source] = run.seen.get(source, 0) + tokens - before[source]
        if progress.step % settings.log_steps == 0 or progress.step == first + 1:
            report(run, loss, pace)
        if timers["save"].due():
            run.save()
        if timers["sample"].due():
            log_samples(run)
        if timers["evaluate"].due():
            log_evaluation(run)
    run.save()
    log_evaluation(run)
    log_samples(run)


def write_metrics(run: Run, values: dict) -> None:
    """Append one line to metrics.jsonl."""
    if run.accelerator.is_main_process:
        run.folder.mkdir(parents=True, exist_ok=True)
        with (run.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**dataclasses.asdict(run.progress), **values}) + "\n")


def report(run: Run, loss: float, pace: float) -> None:
    """One log line: loss, speed, how often the texts were seen, time left."""
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


def run_settings(run: Run) -> dict:
    """What is saved beside the model about how it was made."""
    return {"settings": as_dict(run.settings), "progress": dataclasses.asdict(run.progress)}
