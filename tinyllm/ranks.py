"""The processes of one run: what one decides, all do."""

from __future__ import annotations

import os
from collections.abc import Callable

from tinyllm.errors import AlreadyTold, UserError


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
