"""What a launch was asked for: by ``script/sft_lora.sh``, or by torchrun and accelerate by hand.

The script states its plan in ``TINYLLM_LAUNCH``, as in
``processes=2 device=cpu engine=deepspeed zero=2 dtype=float32``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from tinyllm.errors import UserError

PLAN_VARIABLE = "TINYLLM_LAUNCH"
ENGINES = ("single", "ddp", "deepspeed")
# What starts several processes without torchrun says so here.
COUNT_VARIABLES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True)
class Plan:
    """What was asked for; None where nothing was said.

    Attributes:
        processes: processes on all nodes together.
        device: ``cpu`` or ``cuda``.
        engine: ``single``, ``ddp`` or ``deepspeed``.
        zero: DeepSpeed's ZeRO stage, 0 to 3.
        dtype: precision of the base, ``float32``, ``bfloat16`` or ``float16``.
        by: who asked, for messages.
    """

    processes: int | None = None
    device: str | None = None
    engine: str | None = None
    zero: int | None = None
    dtype: str | None = None
    by: str = ""


def asked_plan(environment: Mapping[str, str] = os.environ, parent: list[str] = ()) -> Plan:
    """What this process was started to be a part of.

    Args:
        environment: the environment variables.
        parent: the words of the parent process's command line.
    """
    if PLAN_VARIABLE in environment:
        return _read(environment[PLAN_VARIABLE])
    for name in COUNT_VARIABLES:
        if environment.get(name, "").isdigit():
            processes, by = int(environment[name]), f"{name}={environment[name]}"
            break
    else:
        processes, by = _accelerate_processes(parent), "accelerate launch"
    wants_deepspeed = environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    return Plan(processes, engine="deepspeed" if wants_deepspeed else None, by=by)


def _read(text: str) -> Plan:
    """``"processes=2 device=cpu"`` → ``Plan(processes=2, device="cpu")``."""
    values = dict(word.split("=", 1) for word in text.split())
    numbers = {name: int(values.pop(name)) for name in ("processes", "zero") if name in values}
    return Plan(**values, **numbers, by="the launcher")


def _accelerate_processes(parent: list[str]) -> int | None:
    """``--num_processes`` of an ``accelerate launch``, or of its ``--config_file``.

    With ``--cpu`` accelerate starts one process whatever number it is given, and passes on nothing
    that tells: the command line is the only trace.
    """
    if not any("accelerate" in word for word in parent):
        return None
    options = dict(pairwise(parent))
    options |= dict(word.split("=", 1) for word in parent if word.startswith("--") and "=" in word)
    if "--num_processes" in options:
        return int(options["--num_processes"])
    if "--config_file" not in options:
        return None
    from accelerate.commands.config.config_args import load_config_from_file

    return load_config_from_file(options["--config_file"]).num_processes


def parent_words() -> list[str]:
    """The command line of the process that started this one; empty where it cannot be seen."""
    import psutil

    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []


def check_processes(plan: Plan, processes: int, use_cpu: bool) -> None:
    """Raise a UserError when not as many processes train together as were started."""
    if plan.processes in (None, processes):
        return
    what = f"{plan.by} asks for {plan.processes} process(es), but {processes} train(s) together"
    if not use_cpu:
        raise UserError(f"{what}: without a GPU add --use_cpu True; nothing was trained")
    raise UserError(
        f"{what}: start them with NPROC={plan.processes} ./script/sft_lora.sh, or torchrun "
        f"--nproc_per_node {plan.processes} sft_lora.py ... --use_cpu True; nothing was trained"
    )
