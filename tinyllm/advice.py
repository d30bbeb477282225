"""Advice before the first step: numbers of a run → what is known to go wrong with such numbers.

Sources: Hu et al. 2021 (arXiv:2106.09685) for what a rank costs; Schulman et al., "LoRA Without
Regret" (2025) for learning rate (about ten times that of full training), batch size and capacity;
Allen-Zhu & Li 2024 (arXiv:2404.05405) for two bits of knowledge in a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tinyllm.native_bf16 import cpu_multiplies_bf16

FEW_STEPS = 50
LORA_RATES = (5e-5, 2e-3)  # below: hardly moves in a short run; above: known to diverge
FULL_RATES = (1e-6, 2e-4)
MANY_NUMBERS = 20  # trained numbers for each supervised token
BITS_PER_NUMBER, BITS_PER_TOKEN = 2, 1
LARGE_BATCH = 64
MANY_EPOCHS = 10
LONG_WARMUP = 0.25
STEEP_SCALE = 8.0
LONG_SECONDS = 60


@dataclass(frozen=True)
class Matrix:
    """A matrix that is adapted: its layer's last name, its size ``(out, in)`` and the rank."""

    name: str
    out: int
    inner: int
    rank: int

    @property
    def break_even(self) -> int:
        """The rank at which ``r (in + out)`` reaches ``in x out``."""
        return -(-self.out * self.inner // (self.out + self.inner))


@dataclass(frozen=True)
class Facts:
    """The numbers of a run, counted over the whole of it where nothing else is said.

    Attributes:
        matrices: what a LoRA adapts; empty when the whole model is trained.
        num_trainable: numbers that are trained.
        num_supervised: tokens to be learned, in one epoch.
        num_rows: training examples, in one epoch.
        scale: what the adapter's output is multiplied by, alpha / r or alpha / sqrt(r).
        num_warmup: steps of warm-up.
        slow_seconds: expected time of the run where it computes in float32 on a CPU that multiplies
            bfloat16 in hardware, else 0.
    """

    matrices: tuple[Matrix, ...]
    num_trainable: int
    num_supervised: int
    num_rows: int
    num_epochs: float
    num_steps: int
    batch_size: int
    learning_rate: float
    num_warmup: float
    scale: float = 1.0
    slow_seconds: float = 0.0

    @property
    def is_lora(self) -> bool:
        return bool(self.matrices)


def advice(facts: Facts) -> list[str]:
    """What to think about before this run starts, most important first; empty when all is usual."""
    return [
        *_about_steps(facts),
        *_about_rate(facts),
        *_about_rank(facts),
        *_about_capacity(facts),
        *_about_epochs(facts),
        *_about_precision(facts),
    ]


def _about_steps(facts: Facts) -> Iterator[str]:
    if facts.num_steps < FEW_STEPS:
        yield (
            f"only {facts.num_steps} optimizer steps: a new identity or style usually needs 100 or "
            "more; raise TRAIN_EPOCHS (--num_train_epochs) or lower GAS "
            "(--gradient_accumulation_steps)"
        )
    if facts.num_warmup >= facts.num_steps:
        yield (
            f"the warm-up lasts {facts.num_warmup:.0f} steps and the run {facts.num_steps}: the "
            "learning rate never reaches its peak; lower --warmup_steps"
        )
    elif facts.num_warmup > LONG_WARMUP * facts.num_steps:
        share = facts.num_warmup / facts.num_steps
        yield f"the warm-up takes {share:.0%} of all steps, 3 to 10% is usual (--warmup_steps 0.03)"


def _about_rate(facts: Facts) -> Iterator[str]:
    low, high = LORA_RATES if facts.is_lora else FULL_RATES
    kind = "a LoRA" if facts.is_lora else "training every weight"
    usual = "1e-4 to 5e-4" if facts.is_lora else "1e-5 to 5e-5"
    if facts.learning_rate > high:
        yield (
            f"a learning rate of {facts.learning_rate:g} is high for {kind} ({usual} is usual): if "
            "the loss jumps or replies turn to noise, lower LR (--learning_rate)"
        )
    elif facts.learning_rate < low:
        yield (
            f"a learning rate of {facts.learning_rate:g} is low for {kind} ({usual} is usual): the "
            "replies may hardly change; raise LR (--learning_rate)"
        )
    if facts.is_lora and facts.scale > STEEP_SCALE:
        yield (
            f"the adapter's output is multiplied by {facts.scale:g} (alpha and r), which acts like "
            "a learning rate as many times higher; 1 to 2 is usual"
        )
    if facts.is_lora and facts.batch_size > LARGE_BATCH:
        yield (
            f"{facts.batch_size} rows in a step: LoRA learns less from large batches than full "
            "training does; 8 to 32 is usual (MBS x GAS x processes)"
        )


def _about_rank(facts: Facts) -> Iterator[str]:
    over: dict[tuple[int, int, int], list[str]] = {}
    for matrix in facts.matrices:
        if matrix.rank >= matrix.break_even:
            over.setdefault((matrix.out, matrix.inner, matrix.rank), []).append(matrix.name)
    for (out, inner, rank), names in over.items():
        least = Matrix("", out, inner, rank).break_even
        yield (
            f"r {rank} on {', '.join(sorted(set(names)))} ({out} x {inner}) trains "
            f"{rank * (out + inner):,} numbers to change a matrix of {out * inner:,}; from r {least} "
            "on a LoRA is larger than what it adapts, so lower LORA_R (--lora_r)"
        )


def _about_capacity(facts: Facts) -> Iterator[str]:
    seen = facts.num_supervised
    if facts.num_trainable > MANY_NUMBERS * seen:
        yield (
            f"{facts.num_trainable:,} trained numbers for {seen:,} tokens to learn: enough to learn "
            "the rows by heart; watch the held-out loss, and bring more rows or lower LORA_R"
        )
    elif facts.is_lora and facts.num_trainable * BITS_PER_NUMBER < seen * BITS_PER_TOKEN:
        yield (
            f"{facts.num_trainable:,} trained numbers for {seen:,} tokens to learn: an adapter of "
            "this size may fill up before the data ends; raise LORA_R or adapt all-linear"
        )


def _about_epochs(facts: Facts) -> Iterator[str]:
    if facts.num_epochs > MANY_EPOCHS and facts.num_steps > 10 * FEW_STEPS:
        yield (
            f"each of {facts.num_rows:,} rows is seen {facts.num_epochs:g} times in "
            f"{facts.num_steps:,} steps: the held-out loss usually turns up long before; compare it "
            "between the epochs"
        )


def _about_precision(facts: Facts) -> Iterator[str]:
    if facts.is_lora and facts.slow_seconds > LONG_SECONDS:
        yield (
            "this CPU multiplies bfloat16 in hardware: with PRECISION=bf16 (--torch_dtype bfloat16) "
            "for the frozen base the training takes about half the time, and the adapter stays in "
            "float32 (docs/speed.md)"
        )


def facts_of(settings, trainer, plan) -> Facts:
    """The numbers of a run that is about to start; what its :class:`tinyllm.plan.Plan` counted is kept."""
    args = settings.training
    matrices, scale = adapted_matrices(trainer.model)
    return Facts(
        matrices=matrices,
        num_trainable=plan.trainable,
        num_supervised=plan.supervised_per_epoch,
        num_rows=plan.examples,
        num_epochs=plan.epochs,
        num_steps=plan.steps,
        batch_size=plan.batch,
        learning_rate=args.learning_rate,
        num_warmup=args.warmup_steps if args.warmup_steps >= 1 else args.warmup_steps * plan.steps,
        scale=scale,
        slow_seconds=(plan.seconds or 0.0) if computes_slowly(settings, trainer.model) else 0.0,
    )


def computes_slowly(settings, model) -> bool:
    """Whether a run that could have its base in bfloat16 computes in float32 on a CPU that is faster
    in bfloat16.
    """
    args = settings.training
    if args.bf16 or args.fp16 or settings.base.is_quantised or settings.lora.moves_base_weights:
        return False
    weight = next(model.parameters())
    in_float32 = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return in_float32 and cpu_multiplies_bf16()


def adapted_matrices(model) -> tuple[tuple[Matrix, ...], float]:
    """The matrices that a model's LoRA layers adapt, and the largest of their scales."""
    found: dict[Matrix, None] = {}
    scale = 1.0
    for name, module in model.named_modules():
        if not isinstance(getattr(module, "r", None), dict) or not hasattr(module, "in_features"):
            continue
        for adapter, rank in module.r.items():
            leaf = name.rsplit(".", 1)[-1]
            found[Matrix(leaf, module.out_features, module.in_features, rank)] = None
            scale = max(scale, module.scaling[adapter])
    return tuple(found), scale
