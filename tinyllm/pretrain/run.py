"""One training run: model, optimizers, text stream and progress, saved and restored as one."""

import dataclasses
import logging
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tinyllm.errors import UserError
from tinyllm.native_bf16 import cpu_multiplies_bf16
from tinyllm.pretrain import checkpoint
from tinyllm.pretrain.compiled import as_written, compile_layers
from tinyllm.pretrain.evaluate import bits_per_character, passages
from tinyllm.pretrain.exported import Exported
from tinyllm.pretrain.model import IGNORE_INDEX, PackedLoss, build_model
from tinyllm.pretrain.model_card import OUR_TEXT
from tinyllm.pretrain.muon import build_optimizers
from tinyllm.pretrain.packing import Mixture, encode_documents, to_tensors
from tinyllm.pretrain.schedule import Progress, rate_factor
from tinyllm.pretrain.settings import Settings

log = logging.getLogger(__name__)

SAMPLE_TOKENS = 48
REPOSITORY = Path(__file__).resolve().parents[2]


def precision_of(settings: Settings) -> str:
    """`bf16` or `fp32`, that of the matrix products (weights and optimizers stay in float32)."""
    if settings.precision != "auto":
        return settings.precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if cpu_multiplies_bf16() else "fp32"


def build_accelerator(precision: str) -> Accelerator:
    """One process of this run.

    Raises:
        UserError: several were started, and this one knows nothing of the others.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpus = started > 1 and not torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=on_cpus)
    if accelerator.num_processes != started:
        raise UserError(
            f"{started} processes were started, but they do not train together; start one process, "
            "or as many as there are GPUs"
        )
    return accelerator


def in_bfloat16(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights as an exported folder holds them: nothing of them is lost."""
    return {name: weight.to(torch.bfloat16) for name, weight in weights.items()}


def add_text(own_texts: list[str], folder: str) -> list[str]:
    """The folders of own text with one more, ours by its name in the repository."""
    path = Path(folder).resolve()
    if path == REPOSITORY / OUR_TEXT:
        name = OUR_TEXT
    else:
        name = str(path) if folder == OUR_TEXT else folder  # that name is taken
    return [*own_texts, *({name} - set(own_texts))]


class Run:
    """Built from settings and text; `restore` brings it to a checkpoint, `train_step` one further.

    `train_texts` and `heldout_texts` are texts by source, `corpus_digest` tells their version.
    """

    def __init__(
        self,
        settings: Settings,
        tokenizer: PreTrainedTokenizerFast,
        train_texts: dict[str, list[str]],
        heldout_texts: dict[str, list[str]],
        corpus_digest: str,
    ) -> None:
        self.settings, self.tokenizer, self.corpus_digest = settings, tokenizer, corpus_digest
        self.folder = settings.path("checkpoints")
        self.heldout = {
            source: passages(texts, settings.evaluate_passages)
            for source, texts in sorted(heldout_texts.items())
        }
        self.pieces = {
            source: encode_documents(texts, tokenizer, settings.max_length)
            for source, texts in train_texts.items()
            if settings.weights.get(source, 0) > 0
        }
        if not self.pieces:
            raise UserError(
                f"there is text of {', '.join(sorted(train_texts))}, but a positive weight only of "
                f"{', '.join(sorted(s for s, w in settings.weights.items() if w > 0)) or 'none'}; see --weights"
            )
        for source in sorted(train_texts.keys() - self.pieces.keys()):
            log.info("text %s: not read, for it has no weight", source)
        self.precision = precision_of(settings)
        self.accelerator = build_accelerator(self.precision)
        self.progress = Progress()
        # Tokens seen per source since the very start, over all changes of the corpus.
        self.seen: dict[str, int] = {}
        self.own_texts = add_text([], settings.own_text)
        # Where the weights came from, when not from random ones, and what they were.
        self.started_from, self.start = "", None
        self.stream = self.new_stream()
        self.model: LlamaForCausalLM = build_model(settings, settings.seed)
        choice = "off" if settings.stage == "export" else settings.compile
        self.compiled = compile_layers(self.model, choice, self.precision)
        self.loss = self.accelerator.prepare(PackedLoss(self.model))
        self.optimizers = build_optimizers(self.model, settings, self.precision == "bf16")
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
            "precision": self.precision,
            "optimizer": self.settings.optimizer,
            "seen": self.seen,
            "own_texts": self.own_texts,
            "started_from": self.started_from,
            "start": self.start,
        }

    def save(self) -> None:
        """Write a checkpoint (the main process only)."""
        if self.accelerator.is_main_process:
            path = checkpoint.save(self.folder, self.state_dict(), self.settings.keep_checkpoints)
            log.info("saved %s", path)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint: exactly, or with a new stream when the text is another."""
        state = checkpoint.load(path)
        if (before := state.get("optimizer", "muon")) != self.settings.optimizer:
            raise UserError(
                f"{path} was trained with --optimizer {before}, not {self.settings.optimizer}: go on "
                "with that one, or give --work another folder"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress, self.seen = Progress(**state["progress"]), dict(state["seen"])
        self.own_texts = add_text(state.get("own_texts", []), self.settings.own_text)
        self.started_from, self.start = state.get("started_from", ""), state.get("start")
        log.info("resumed at step %d from %s", self.progress.step, path)
        if (before := state.get("precision", "fp32")) != self.precision:
            log.info(
                "products were in %s before, and are in %s from here on", before, self.precision
            )
        if (state["corpus"], state["weights"]) == (self.corpus_digest, self.settings.weights):
            self.stream.seed = state["stream_seed"]
            self.stream.load_state_dict(state["stream"])
            log.info("corpus %s is unchanged: the stream goes on exactly", self.corpus_digest)
        else:
            self.stream = self.new_stream()
            log.info("corpus or weights changed: a new stream begins at this step")

    def start_from(self, exported: Exported) -> None:
        """Begin with the weights of an exported folder, and count on from what they saw."""
        self.model.load_state_dict(exported.weights)
        self.started_from, self.start = exported.folder, in_bfloat16(exported.weights)
        history = exported.history
        self.progress, self.seen = history.progress, dict(history.seen)
        self.own_texts = add_text(history.own_texts, self.settings.own_text)
        self.stream = self.new_stream()
        log.info("started at step %d from the weights in %s", self.progress.step, exported.folder)

    def check_export(self) -> None:
        """Raise a UserError where the export would fail, or overwrite the folder that the run began from."""
        settings, before = self.settings, self.started_from
        if settings.start_share and self.start is None:
            raise UserError("--start_share: this run did not begin with --start_from")
        if before and Path(before).resolve() == Path(settings.export_to).resolve():
            raise UserError(f"{before} would be overwritten; give --export_to another folder")

    def next_batch(self) -> dict[str, torch.Tensor]:
        """Tensors (R, T) of one optimizer step, all processes together; counts what is seen."""
        before = dict(self.stream.tokens)
        rows = self.stream.next_rows(self.settings.rows_per_step, self.settings.max_length)
        self.progress.tokens += sum(len(piece) for row in rows for piece in row)
        for source, tokens in self.stream.tokens.items():
            self.seen[source] = self.seen.get(source, 0) + tokens - before[source]
        return to_tensors(rows, self.settings.max_length, self.tokenizer.pad_token_id)

    def train_step(self) -> float:
        """One optimizer step; returns the mean loss per token over all processes."""
        accelerator, size = self.accelerator, self.settings.rows_per_forward
        batch = self.next_batch()
        num_labels = int((batch["labels"] != IGNORE_INDEX).sum())
        mine = range(accelerator.process_index, len(batch["labels"]), accelerator.num_processes)
        total = torch.zeros((), device=accelerator.device)
        for start in range(0, len(mine), size):
            index = list(mine[start : start + size])
            part = {name: t[index].to(accelerator.device) for name, t in batch.items()}
            loss = self.loss(**part) / num_labels
            total += loss.detach()
            # DDP averages gradients, while the loss is already a share of the whole step.
            accelerator.backward(loss * accelerator.num_processes)
        self.update()
        self.progress.step += 1
        return accelerator.reduce(total, "sum").item()

    def anywhere(self, flag: bool) -> bool:
        """Whether it is so in at least one process; all of them must ask."""
        mark = torch.tensor(float(flag), device=self.accelerator.device)
        return self.accelerator.reduce(mark, "sum").item() > 0

    def slowest(self, seconds: float) -> float:
        """The longest time of all processes; all of them must ask."""
        mine = torch.tensor([seconds], device=self.accelerator.device, dtype=torch.float64)
        return self.accelerator.gather(mine).max().item()

    def update(self) -> None:
        """Clip what AdamW trains (Muon's step has a fixed size), set the rates, step."""
        factor = rate_factor(self.settings, self.progress)
        adamw = [p for group in self.optimizers[-1].param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(adamw, self.settings.max_grad_norm)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def evaluate(self, model: LlamaForCausalLM | None = None) -> dict[str, float]:
        """Bits per character per held-out source, of this model or another one."""
        with as_written():
            return {
                source: round(bits_per_character(model or self.model, self.tokenizer, texts), 4)
                for source, texts in self.heldout.items()
            }

    @torch.no_grad()
    def sample(self, prompt: str) -> str:
        """A continuation (seeded by the step; the random numbers of the training are untouched)."""
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        with torch.random.fork_rng(), as_written():
            torch.manual_seed(self.progress.step)
            ids = self.model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                max_new_tokens=SAMPLE_TOKENS, do_sample=True, temperature=0.7, top_k=40,
            )[0]  # fmt: skip
        return self.tokenizer.decode(ids, skip_special_tokens=True).replace("\n", "⏎")
