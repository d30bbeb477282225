"""After the start: is this the run that was asked for?  On every rank, before anything is trained.

What libraries do silently: train alone in every process, start one process instead of two, drop
DeepSpeed, give all ranks the same rows.  Each is an error here.
"""

from __future__ import annotations

import hashlib
import json
from itertools import islice

import torch
from accelerate.utils import DistributedType

from tinyllm import ranks
from tinyllm.errors import UserError
from tinyllm.launch_plan import Plan, asked_plan, check_processes, parent_words
from tinyllm.settings import Settings
from tinyllm.sharded import is_sharded, zero_stage

CHECKED_STEPS = 64


def check_start(settings: Settings) -> list[str]:
    """Check number of processes and device, right after the settings are read.

    Returns:
        Notes to print.

    Raises:
        UserError: this is not what was asked for.
    """
    args, plan = settings.training, asked_plan(parent=parent_words())
    check_processes(plan, args.world_size, args.use_cpu)
    check_device(plan, args.device)
    check_precision(settings, plan)
    notes = use_one_gpu(args)
    if args.deepspeed_plugin is not None:
        from tinyllm.deepspeed_ops import avoid_compiling

        check_deepspeed(settings)
        notes += avoid_compiling(args.deepspeed_plugin.deepspeed_config)
    _check_agreement("settings", _digest(_shared_settings(settings)))
    return notes


def use_one_gpu(args) -> list[str]:
    """Of several GPUs in one process take the first, and say so.

    transformers would wrap the model in DataParallel, which cuts every tensor along its first
    dimension; our batches have no such dimension.
    """
    if args.n_gpu <= 1:
        return []
    note = f"{args.n_gpu} GPUs found, one is used; ./script/sft_lora.sh uses all of them"
    args._n_gpu = 1
    return [note]


def check_device(plan: Plan, device: torch.device) -> None:
    """Raise a UserError when the device is another than the launcher's."""
    if plan.device and device.type != plan.device:
        raise UserError(
            f"the launcher asks for {plan.device}, this process got {device}; does PyTorch see the "
            'GPU (python -c "import torch; print(torch.cuda.is_available())")?'
        )


def check_precision(settings: Settings, plan: Plan) -> None:
    """Raise a UserError when the launcher's precision was changed behind its back."""
    dtype = settings.base.torch_dtype
    if plan.dtype and dtype not in ("auto", plan.dtype):
        raise UserError(
            f"--torch_dtype {dtype}, but the launcher chose {plan.dtype}; set PRECISION instead"
        )


def check_deepspeed(settings: Settings) -> None:
    """Raise a UserError for settings that do not go together with DeepSpeed."""
    args = settings.training
    if args.bf16 or args.fp16:
        raise UserError(
            f"--{'bf16' if args.bf16 else 'fp16'} True with DeepSpeed would keep the adapter in half "
            "precision: leave it out, and set --torch_dtype for the base (PRECISION=bf16)"
        )
    if is_sharded(args) and settings.run.save_full_model:
        raise UserError(
            "--save_full_model True with ZeRO-3: no process holds the full model; merge afterwards "
            "with python load_lora_model.py, or use ZERO_STAGE=2"
        )


def check_trainer(settings: Settings, trainer, data) -> None:
    """Check engine, precision and the ranks' rows, before the first step.

    Raises:
        UserError: this is not what was asked for.
    """
    plan, state = asked_plan(parent=parent_words()), trainer.accelerator.state
    engine = engine_of(state)
    if plan.engine and engine != plan.engine:
        raise UserError(f"{plan.by} asks for {plan.engine}, but the Trainer runs {engine}")
    stage = zero_stage(trainer.args)
    if plan.zero is not None and stage != plan.zero:
        raise UserError(f"the launcher asks for ZeRO-{plan.zero}, but DeepSpeed runs ZeRO-{stage}")
    if getattr(trainer.model, "hf_device_map", None):
        raise UserError("device_map cannot be combined with several processes or DeepSpeed")
    check_dtypes(trainer.model, plan.dtype if settings.lora.use_lora else None)
    _check_agreement("training rows", data.train.digest)
    check_shares(trainer)


def engine_of(state) -> str:
    """``single``, ``ddp`` or ``deepspeed``, from accelerate's state."""
    if state.distributed_type == DistributedType.DEEPSPEED or state.deepspeed_plugin is not None:
        return "deepspeed"
    return "single" if state.num_processes == 1 else "ddp"


def check_dtypes(model, dtype: str | None) -> None:
    """Raise a UserError unless trained weights are float32, and the frozen ones as asked."""
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    if trained != {torch.float32}:
        raise UserError(f"trained weights are {trained}, expected float32 alone")
    if dtype and frozen and frozen != {getattr(torch, dtype)}:
        raise UserError(f"the base's weights are {frozen}, the launcher chose {dtype}")


def check_shares(trainer) -> None:
    """Raise a UserError when two ranks would train on the same row, or a row is left out."""
    if ranks.num_ranks() == 1:
        return
    with torch.random.fork_rng(devices=[]):  # looking must not change what is drawn later
        batches = trainer.get_train_dataloader().batch_sampler
        mine = [list(rows) for rows in islice(iter(batches), CHECKED_STEPS)]
    everyone = ranks.gather(mine)
    rows = [row for share in everyone for batch in share for row in batch]
    steps = {len(share) for share in everyone}
    whole_epoch = len(mine) == len(batches) and not trainer.args.dataloader_drop_last
    missing = whole_epoch and len(set(rows)) != len(trainer.train_dataset)
    if len(set(rows)) != len(rows) or len(steps) != 1 or missing:
        raise UserError(
            f"the processes' rows overlap or leave rows out ({len(rows)} given to "
            f"{len(everyone)} processes, {len(set(rows))} of them different)"
        )


def _check_agreement(what: str, digest: str) -> None:
    """Raise a UserError naming the first rank whose digest is another than rank 0's."""
    digests = ranks.gather(digest)
    other = next((i for i, one in enumerate(digests) if one != digests[0]), None)
    if other is not None:
        raise UserError(
            f"processes 0 and {other} have different {what}; start every node with the same "
            "command, environment and files"
        )


def _shared_settings(settings: Settings) -> dict:
    from tinyllm.run import flat_settings

    return {k: v for k, v in flat_settings(settings).items() if k not in ("local_rank", "run_name")}


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
