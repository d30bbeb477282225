"""What a run is about to do, in numbers, before its first step.

Time and activations are calibrated on this machine with a piece of this very data; weights,
optimizer and logits are computed.  Nothing that the training sees is changed: gradients are dropped
and the random numbers are put back.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tinyllm.batches import Batch, collate, split, targets
from tinyllm.data import Data
from tinyllm.head_loss import chunk_bytes
from tinyllm.lora import count_parameters
from tinyllm.memory import resident_bytes
from tinyllm.settings import Settings

FLOAT32 = 4
ADAM_BYTES = 2 * FLOAT32  # two moments for each trained parameter
LOGIT_COPIES = 3  # logits, their log-softmax and the gradient, before the first is let go
# What a CPU process takes besides once it trains: libraries imported at the first step, and memory
# that the allocator keeps; benchmarks/memory_estimate.py found 110 to 170 MiB.
TRAINING_OVERHEAD = 140 * 2**20
FORWARD_SHARE = 1 / 3  # of a training step; an evaluation has no backward pass
SPREAD = 3  # standard deviations that the largest step lies above the mean one


@dataclass(frozen=True)
class Memory:
    """Expected peak, in bytes, by what it is for.

    ``rest`` is what the process holds beside the weights: libraries and rows (0 on a GPU).
    """

    rest: int
    weights: int
    training: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.rest + self.weights + self.training + self.activations + self.logits


@dataclass(frozen=True)
class Plan:
    """The numbers of a run that is about to start.

    Attributes:
        seconds: expected time of the training, None where a step cannot be timed beforehand.
        memory: expected peak of the device (of the process, on a CPU), None likewise.
    """

    steps: int
    epochs: float
    examples: int
    batch: int
    tokens_per_epoch: int
    supervised_per_epoch: int
    trainable: int
    parameters: int
    evaluations: int
    seconds: float | None
    memory: Memory | None

    def to_json(self) -> dict:
        """Plain numbers, with the memory's total among them."""
        content = asdict(self)
        if self.memory:
            content["memory"]["total"] = self.memory.total
        return content


def make_plan(settings: Settings, trainer, data: Data) -> Plan:
    """Count and calibrate; takes about as long as two steps.

    Args:
        trainer: an :class:`tinyllm.trainer.SftTrainer` that has not started.
    """
    args, train = settings.training, data.train
    trainable, parameters = count_parameters(trainer.model)
    batch = (args.per_device_train_batch_size * args.gradient_accumulation_steps
             * trainer.accelerator.num_processes)  # fmt: skip
    per_epoch = math.ceil(len(train) / batch)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    evaluations = count_evaluations(args, steps, steps / per_epoch) if data.held_out else 0
    resting = resident_bytes()  # before calibrating, which leaves memory behind in the allocator
    pace, saved = calibrate(trainer, train) if can_calibrate(trainer) else (None, None)
    seconds = None
    if pace is not None:
        tokens = steps * train.lengths.mean() * batch / trainer.accelerator.num_processes
        held_out = len(data.held_out.input_ids) if data.held_out else 0
        seconds = pace * (tokens + FORWARD_SHARE * evaluations * held_out)
    memory = None
    if saved is not None:
        memory = expected_memory(trainer, data, saved, trainable, resting)
    return Plan(
        steps, steps / per_epoch, len(train), batch, len(train.input_ids), train.num_supervised,
        trainable, parameters, evaluations, seconds, memory,
    )  # fmt: skip


def count_evaluations(args, steps: int, epochs: float) -> int:
    """How often the held-out rows are evaluated, the one before the training included."""
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if strategy == "steps":
        every = args.eval_steps or args.logging_steps
        every = every if every >= 1 else max(1, math.ceil(steps * every))
        return 1 + steps // int(every)
    return 1 + math.ceil(epochs) if strategy == "epoch" else 2


def can_calibrate(trainer) -> bool:
    """Whether the model is where it will be trained: DeepSpeed and FSDP place it later."""
    return not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def calibrate(trainer, train) -> tuple[float, float]:
    """Run a usual micro-batch twice: seconds a token, and bytes a token kept for backward.

    The logits are not among the bytes.  Dropout's random numbers are the same afterwards.
    """
    args, number = trainer.args, min(len(train), trainer.args.per_device_train_batch_size)
    batch = collate([train[i * len(train) // number] for i in range(number)])
    usual = _on_device(next(split(batch, trainer.tokens_per_micro_batch)), args.device)
    devices = [args.device] if args.device.type == "cuda" else []
    was_training = trainer.model.training
    if args.gradient_checkpointing:  # as the Trainer does when it starts
        trainer.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    trainer.model.train()
    try:
        with torch.random.fork_rng(devices):
            saved = count_saved(trainer, usual)  # the first of its size also warms up
            started = time.perf_counter()
            _one_pass(trainer, usual)
            pace = (time.perf_counter() - started) / len(usual["input_ids"])
    finally:
        trainer.model.zero_grad(set_to_none=True)
        trainer.model.train(was_training)
    return pace, saved


def _on_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _one_pass(trainer, batch: Batch) -> None:
    _loss(trainer, batch).backward()
    if trainer.args.device.type == "cuda":
        torch.cuda.synchronize(trainer.args.device)


def _loss(trainer, batch: Batch) -> torch.Tensor:
    args = trainer.args
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    with torch.autocast(args.device.type, dtype, enabled=bool(args.fp16 or args.bf16)):
        return trainer.sum_of_losses(trainer.model, batch)


def count_saved(trainer, batch: Batch) -> float:
    """Bytes a token that autograd keeps for the backward pass, weights and logits not counted."""
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    sizes: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = _loss(trainer, batch)
    loss.backward()
    total = sum(sizes.values())
    if not trainer.chunked_loss:
        total -= FLOAT32 * len(targets(batch)[0]) * vocabulary(trainer)
    return max(0, total) / len(batch["input_ids"])


def vocabulary(trainer) -> int:
    """Words that the head chooses from."""
    return trainer.causal_model.config.get_text_config().vocab_size


def largest_micro_batch(trainer, lengths, per_step: int) -> int:
    """Tokens of the largest micro-batch to expect: bounded by the setting, or by what a step has."""
    step = lengths.mean() * per_step + SPREAD * lengths.std() * math.sqrt(per_step)
    bound = max(trainer.tokens_per_micro_batch, int(lengths.max()))
    return int(min(bound, max(step, lengths.max())))


def expected_memory(trainer, data: Data, saved: float, trainable: int, resting: int) -> Memory:
    """Peak of a training step, from what is held now and what a step adds."""
    args, train = trainer.args, data.train
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    weights -= _tied_bytes(trainer.model)
    on_cpu = args.device.type == "cpu"
    tokens = largest_micro_batch(trainer, train.lengths, args.per_device_train_batch_size)
    return Memory(
        rest=max(0, resting - weights) + TRAINING_OVERHEAD if on_cpu else 0,
        weights=weights + trainer.bytes_of_packing(),
        training=trainable * (FLOAT32 + ADAM_BYTES),
        activations=int(saved * tokens),
        logits=logits_bytes(trainer, data, tokens),
    )


def _tied_bytes(model) -> int:
    """Bytes counted twice because two parameters are one place in memory (none, once deduplicated)."""
    seen: set[int] = set()
    twice = 0
    for parameter in model.parameters():
        pointer = parameter.data_ptr()
        if pointer and pointer in seen:
            twice += parameter.numel() * parameter.element_size()
        seen.add(pointer)
    return twice


def logits_bytes(trainer, data: Data, tokens: int) -> int:
    """Logits of the largest training or evaluation batch, as many copies as are held at once."""
    if trainer.chunked_loss and trainer.accelerator.num_processes == 1:
        return chunk_bytes(trainer.causal_model.get_output_embeddings().weight, tokens)
    share = data.train.num_supervised / max(1, len(data.train.input_ids))
    learned = tokens * share
    if data.held_out:
        rows = min(len(data.held_out), trainer.args.per_device_eval_batch_size)
        learned = max(learned, data.held_out.num_supervised / len(data.held_out) * rows)
    return int(FLOAT32 * LOGIT_COPIES * learned * vocabulary(trainer))


def describe(plan: Plan, settings: Settings, trainer) -> str:
    """The plan as it is printed."""
    args = settings.training
    lines = [
        f"plan: {plan.steps:,} steps of {plan.batch} examples ({args.per_device_train_batch_size} "
        f"rows x {args.gradient_accumulation_steps} accumulated x "
        f"{trainer.accelerator.num_processes} process(es)), {plan.epochs:.3g} epochs, "
        f"on {trainer.args.device}",
        f"  examples    {plan.examples:,} an epoch, {plan.tokens_per_epoch:,} tokens, "
        f"{plan.supervised_per_epoch:,} of them supervised",
        f"  parameters  {plan.trainable:,} of {plan.parameters:,} trained",
        f"  time        {_time(plan)}",
        f"  memory      {_memory(plan)}",
        f"  files       {settings.output_dir}",
    ]
    return "\n".join(lines)


def _time(plan: Plan) -> str:
    if plan.seconds is None:
        return "known after the first steps (the model is placed when the training starts)"
    minutes, seconds = divmod(round(plan.seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h" if hours else "", f"{minutes} min" if minutes else "",
             f"{seconds} s" if not hours else ""]  # fmt: skip
    text = " ".join(part for part in parts if part)
    return f"about {text}, {plan.evaluations} evaluations included (from timing a micro-batch)"


def _memory(plan: Plan) -> str:
    if plan.memory is None:
        return "known after the first steps"
    parts = plan.memory
    names = (("libraries and rows", parts.rest), ("weights", parts.weights),
             ("gradients and optimizer", parts.training), ("activations", parts.activations))  # fmt: skip
    text = ", ".join(f"{name} {_mib(size)}" for name, size in names if size)
    return f"about {_mib(parts.total)} MiB: {text}\n  logits      {_mib(parts.logits)} MiB of that"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"


@contextlib.contextmanager
def leaving_no_folder(folder: Path) -> Iterator[None]:
    """Take away the empty folders that a block makes on the way to ``folder``."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
