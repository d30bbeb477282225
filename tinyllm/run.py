"""What a run is (its identity), and whether its folder holds nothing, a part, or all of it."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from tinyllm import checkpoint, run_folder
from tinyllm.base import read_json
from tinyllm.data import Data
from tinyllm.errors import UserError
from tinyllm.fingerprint import fingerprint
from tinyllm.interrupt import StopRequest
from tinyllm.lock import FolderLock
from tinyllm.ranks import decide_on_first
from tinyllm.remote_code import code_identity
from tinyllm.report.settings import REPORT_ONLY
from tinyllm.resume import chosen, flat, newest, parse_choice, trim_log, without_news
from tinyllm.settings import Settings

ANEW = (
    "start anew with --overwrite_output_dir True (the old run is kept, moved aside), or choose "
    "another --output_dir (OUTPUT_DIR=...)"
)
PACKAGES = ("torch", "transformers", "peft", "accelerate")
# Settings that change nothing about the weights that come out.
WITHOUT_EFFECT = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name", "report_to",
    "logging_steps", "logging_strategy", "logging_first_step", "disable_tqdm", "log_level",
    "save_steps", "save_strategy", "save_total_limit", "save_on_each_node", "save_only_model",
    "per_device_eval_batch_size", "num_sample_replies", "save_full_model", "eval_dataset",
    "eval_share", "base_model_path", "dataset", "data_cache", "preview", "local_rank",
    "eval_steps", "eval_strategy", "verify_resume", "dataloader_num_workers", "ddp_timeout",
    "accept_license", "remote_code_hash", "logging_nan_inf_filter", "log_on_each_node",
    "log_level_replica", "include_num_input_tokens_seen", "project", "push_to_hub", "hub_model_id",
    "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "skip_memory_metrics", "prediction_loss_only", "eval_on_start", "eval_delay", "debug",
    "eval_accumulation_steps", "do_train", "do_eval", "do_predict", "ddp_backend",
} | REPORT_ONLY  # fmt: skip
# They decide which checkpoint is the best, or when to stop, where that is asked for.
CHOOSE_THE_BEST = {
    "eval_steps", "eval_strategy", "save_steps", "save_strategy", "eval_dataset", "eval_delay",
    "eval_on_start",
}  # fmt: skip


@dataclass
class Run:
    """A run about to start: its folder, what it is, and where to go on from.

    Use it as a context: inside, the folder is this run's alone, and signals are watched.
    """

    folder: Path
    identity: dict
    settings: dict
    resume_from: str | None = None
    already_finished: bool = False
    lock: FolderLock | None = None
    stop: StopRequest = field(default_factory=StopRequest)

    def __enter__(self) -> Run:
        self.stop.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.stop.__exit__(*error)
        if self.lock is not None:
            self.lock.release()


def open_run(settings: Settings, tokenizer, data: Data) -> Run:
    """Claim the run folder; nothing in it is ever overwritten silently.

    Raises:
        UserError: the folder holds another run, something that is no run at all, or a run that is
            under way; the checkpoint asked for cannot be used.
    """
    folder = settings.output_dir
    run = Run(folder, identity_of(settings, tokenizer, data), flat_settings(settings))
    try:
        run.already_finished, run.resume_from = decide_on_first(
            settings.training, lambda: _claim(run, settings, data)
        )
        if run.resume_from and not Path(run.resume_from).is_dir():
            raise UserError(
                f"{run.resume_from}: this machine does not see the checkpoint that the first one "
                "goes on from; give an --output_dir that all machines share"
            )
    except BaseException:
        if run.lock is not None:
            run.lock.release()
            with contextlib.suppress(OSError):
                folder.rmdir()  # succeeds only when it is empty: nothing was begun
        raise
    return run


def _claim(run: Run, settings: Settings, data: Data) -> tuple[bool, str | None]:
    """On rank 0: ``(already finished, checkpoint to go on from)``, and the folder is ours."""
    from tinyllm.sft import say

    folder, choice = run.folder, parse_choice(settings.training.resume_from_checkpoint)
    anew = settings.run.overwrite_output_dir
    if not anew and _is_finished(run, say):
        return True, None
    run.lock = _take_lock(folder)
    if not anew and _is_finished(run, say):  # it was under way a moment ago
        return True, None
    if anew or (choice is False and run_folder.look(folder).status == "running"):
        _move_aside(run, say)
    resume_from = _resume_from(run, choice, say)
    _say_other_versions(folder, say)
    with run_folder.clear_if_unwritable(folder):
        run_folder.create(folder)
        run_folder.remove_leftovers(folder)
        checkpoint.remove_leftovers(folder)
        trim_log(folder / run_folder.LOG_FILE, resume_from)
        run_folder.write_json(folder / run_folder.DATA_REPORT, data.ledger.report())
        write_run_file(run, "running")
    return False, resume_from


def _is_finished(run: Run, say) -> bool:
    """Whether the folder holds this very run, finished; another run in it is refused."""
    found = run_folder.look(run.folder)
    if found.status == "new":
        return False
    if changed := run_folder.difference(
        flat(found.identity), flat(without_news(found.identity, run.identity))
    ):
        raise UserError(
            f"{run.folder} holds a {found.status} run of another kind: {changed}; {ANEW}"
        )
    if found.status == "finished":
        say(f"{run.folder} already holds this very run, finished: nothing to do; {ANEW}")
    return found.status == "finished"


def _say_other_versions(folder: Path, say) -> None:
    """Libraries and threads decide about the last bits: a change is said, and allowed."""
    if run_folder.look(folder).status != "running":
        return
    before = read_json(folder / run_folder.RUN_FILE).get("versions", {})
    if changed := run_folder.difference(before, versions()):
        say(f"note: {changed} since this run began; the last bits of the result may differ")


def versions() -> dict[str, str]:
    """Of the libraries that compute, and the number of threads they use."""
    return {name: version(name) for name in PACKAGES} | {"threads": str(torch.get_num_threads())}


def _take_lock(folder: Path) -> FolderLock:
    with run_folder.clear_if_unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder)
        lock.take()
    return lock


def _move_aside(run: Run, say) -> None:
    """Put the earlier run, which we hold the lock of, out of the way."""
    run.lock.release()
    is_empty = not any(run.folder.iterdir())
    if is_empty:
        run.folder.rmdir()
    aside = run_folder.move_aside(run.folder)
    say(f"moved the earlier {run.folder} aside to {aside}" if aside else "nothing to move aside")
    run.lock = _take_lock(run.folder)


def _resume_from(run: Run, choice: str | bool | None, say) -> str | None:
    """The checkpoint to go on from, None for step 1."""
    if isinstance(choice, str):
        path = chosen(Path(choice), run.identity, say)
    else:
        path = newest(run.folder, run.identity, say)
    if path:
        say(f"going on with an unfinished run, from {path}")
        return path
    if choice is True:
        raise UserError(
            f"--resume_from_checkpoint True: {run.folder} holds no checkpoint to go on from; "
            "leave it out to start from step 1"
        )
    if run_folder.look(run.folder).status == "running":
        say(f"{run.folder} holds an interrupted run and no checkpoint to go on from: from step 1")
    return None


def identity_of(settings: Settings, tokenizer, data: Data) -> dict:
    """Everything that decides which weights come out."""
    flat_ones, args = flat_settings(settings), settings.training
    # with either, the evaluations decide about the weights
    best = args.load_best_model_at_end or settings.run.early_stopping_patience > 0
    ignored = WITHOUT_EFFECT - CHOOSE_THE_BEST if best else WITHOUT_EFFECT
    identity = {
        "base": fingerprint(settings.base.base_model_path, tokenizer)
        | code_identity(settings.base),
        "data": data.train.digest,
        "settings": {k: v for k, v in flat_ones.items() if k not in ignored},
        "processes": args.world_size,
        "device": args.device.type,
        "engine": engine_of(args),
        **adapter_identity(settings.lora.adapter_path),
    }
    if best and data.held_out is not None:
        identity["held-out data"] = data.held_out.digest
    return identity


def engine_of(args) -> str:
    """What moves the weights: PyTorch alone or DeepSpeed, and in which precision."""
    plugin = getattr(args, "deepspeed_plugin", None)
    name = f"DeepSpeed ZeRO-{plugin.zero_stage}" if plugin is not None else "PyTorch"
    return f"{name}, mixed precision {args.mixed_precision}"


def adapter_identity(path: str) -> dict[str, str]:
    """The content of the adapter that is trained further, if one is."""
    if not path:
        return {}
    from tinyllm.adapter import read_adapter
    from tinyllm.file_hash import hash_file

    return {"adapter": hash_file(Path(path) / read_adapter(path).weights_file)}


def flat_settings(settings: Settings) -> dict:
    """Our settings in full, and those of TrainingArguments that differ from its defaults."""
    ours: dict = {}
    for part in (settings.base, settings.lora, settings.data, settings.run):
        ours |= asdict(part)
    default = type(settings.training)(output_dir="x", use_cpu=settings.training.use_cpu).to_dict()
    training = settings.training.to_dict()
    always = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "lr_scheduler_type",
              "gradient_accumulation_steps", "warmup_steps", "seed", "output_dir")  # fmt: skip
    chosen = {k: v for k, v in training.items() if k in always or v != default.get(k)}
    chosen.pop("hub_token", None)  # a secret: it belongs in no file
    return ours | chosen


def write_run_file(run: Run, status: str, **more) -> None:
    """Write ``run.json``: the run's identity, settings and versions."""
    content = {
        "status": status,
        "identity": run.identity,
        "settings": run.settings,
        "versions": versions(),
        **more,
    }
    run_folder.write_json(run.folder / run_folder.RUN_FILE, content)
