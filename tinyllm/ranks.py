"""The processes of one run: what one decides, all do; what each has, all can see; who works first.

With one process nothing is exchanged.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from tinyllm.errors import AlreadyTold, UserError

T = TypeVar("T")
# Preparing a very large data set may take hours; the default of the training's group is half an hour.
PATIENCE = timedelta(days=2)


def is_first() -> bool:
    """Whether this is rank 0, or the only process."""
    return int(os.environ.get("RANK", "0")) == 0


def decide_on_first(args, decide: Callable[[], object]):
    """Let rank 0 decide, and give its answer, or its :class:`UserError`, to every rank.

    Args:
        args: TrainingArguments; they have joined the processes.

    Raises:
        UserError: what rank 0 raised; on the others an :class:`AlreadyTold`.
    """
    if args.world_size == 1:
        return decide()
    from accelerate.utils import broadcast_object_list

    answer, failure = None, None
    if is_first():
        try:
            answer = decide()
        except UserError as error:
            failure = error
    box = [answer, str(failure) if failure else None]
    broadcast_object_list(box, from_process=0)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise AlreadyTold(box[1])
    return box[0]


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@functools.cache
def _control() -> dist.ProcessGroup:
    """A group beside the training's: on the CPU, and with patience."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def gather(value: T) -> list[T]:
    """The values of all ranks, in their order, on every rank.

    Raises:
        UserError: another process has gone.
    """
    if num_ranks() == 1:
        return [value]
    values: list = [None] * num_ranks()
    _patiently(lambda: dist.all_gather_object(values, value, group=_control()))
    return values


def in_turns(prepare: Callable[[], T]) -> T:
    """Run ``prepare`` on rank 0, then on one rank of every other node, then on the rest.

    What rank 0 leaves in a cache is there for all; a node that does not share its disk fills its own
    cache once.
    """
    if num_ranks() == 1:
        return prepare()
    turn = 0 if rank() == 0 else 1 if os.environ.get("LOCAL_RANK", "0") == "0" else 2
    result = None
    for now in range(3):
        if now == turn:
            result = prepare()
        _patiently(lambda: dist.barrier(group=_control()))
    return result


def _patiently(exchange: Callable[[], None]) -> None:
    try:
        exchange()
    except RuntimeError as error:  # what gloo raises when the other end has closed
        if "closed" not in str(error).lower() and "reset" not in str(error).lower():
            raise
        raise UserError("another process of this run has ended; see its own message") from error
