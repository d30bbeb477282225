"""Everything that watches a training: bar, log, replies, early stopping, lineage."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import default_logdir

from tinyllm.chat_format import chat_format_of
from tinyllm.data import Data
from tinyllm.errors import UserError
from tinyllm.progress import EarlyStopping, EvalReplies, Lineage, LogFile, Progress
from tinyllm.report.replies import questions_of
from tinyllm.run_folder import LINEAGE, LOG_FILE, REPLIES
from tinyllm.settings import Settings
from tinyllm.sharded import is_sharded


def watchers(settings: Settings, tokenizer, data: Data) -> list[TrainerCallback]:
    """The Trainer's callbacks, in the order in which they speak.

    Raises:
        UserError: early stopping without anything to evaluate.
    """
    args, run, folder = settings.training, settings.run, settings.output_dir
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    found: list[TrainerCallback] = [
        LogFile(folder / LOG_FILE),
        Lineage(folder / LINEAGE),
        Progress(float(data.train.lengths.mean()) * rows),
    ]
    if run.eval_replies and data.held_out is not None and not (is_sharded(args) or args.fsdp):
        questions = questions_of(data.sample_records, settings.data.system_prompt, run.eval_replies)
        found.append(EvalReplies(folder / REPLIES, questions, chat_format_of(tokenizer)))
    if run.early_stopping_patience:
        if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
            raise UserError(
                "--early_stopping_patience needs evaluations: set --eval_strategy to epoch or steps"
            )
        found.append(EarlyStopping(run.early_stopping_patience, run.early_stopping_threshold))
    return found


def keep_tensorboard_in(folder: Path, trainer) -> None:
    """Let TensorBoard write into the run folder from the first value on.

    Its callback learns the folder only when training begins, and the evaluation before that would
    go to ``./runs``.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder / default_logdir())
