"""The steps of a training run, in the order in which ``sft_lora.py`` takes them."""

from __future__ import annotations

import sys
from functools import partial

import torch

from tinyllm import data as data_stage
from tinyllm import ranks, run_folder
from tinyllm.adapter import own_tokenizer, read_adapter
from tinyllm.advice import advice, facts_of
from tinyllm.base import check_base_folder, context_length, load_base, resolve_base
from tinyllm.base_record import verify_base
from tinyllm.chat_format import chat_format_of, has_own_template
from tinyllm.data import Data
from tinyllm.errors import UserError
from tinyllm.faults import one_line_for_faults
from tinyllm.finish import finish, show_samples
from tinyllm.fused_layers import join_projections, use_fused_layers
from tinyllm.interrupt import NeverStop
from tinyllm.launch_check import check_start, check_trainer
from tinyllm.lora import add_lora, count_parameters, describe_adapter
from tinyllm.lora_start import keep_start
from tinyllm.memory import peak_bytes
from tinyllm.native import pointwise
from tinyllm.native.heap import keep_freed_memory
from tinyllm.plan import describe as describe_plan
from tinyllm.plan import leaving_no_folder, make_plan
from tinyllm.precision import choose_dtype
from tinyllm.preview import marks_for, preview
from tinyllm.progress import EvaluateBefore
from tinyllm.qlora import check_quantisation, prepare_quantised, quantisation_config
from tinyllm.remote_code import check_code
from tinyllm.resume import loss_before_training
from tinyllm.row_search import find_rows
from tinyllm.run import Run, open_run
from tinyllm.saved_adapter import CheckSavedAdapter
from tinyllm.settings import USUAL_MAX_LENGTH, Settings
from tinyllm.sharded import is_sharded, num_elements
from tinyllm.trainer import SftTrainer
from tinyllm.verify_resume import verify_resume
from tinyllm.vocabulary import add_tokens, fit_vocabulary
from tinyllm.watchers import keep_tensorboard_in, watchers

__all__ = [
    "build_trainer",
    "check_start",
    "dry_run",
    "finish",
    "load_examples",
    "load_model",
    "open_run",
    "prepare_model",
    "print_plan",
    "say_once",
    "show_preview",
    "show_samples",
    "train",
    "verify_resume",
]  # fmt: skip


def say(text: str) -> None:
    """A line of progress, on rank 0 alone."""
    if ranks.is_first():
        print(text, file=sys.stderr, flush=True)


def say_once(notes: list[str]) -> None:
    """Notes about translated settings."""
    for text in dict.fromkeys(notes):
        say(f"note: {text}")


def load_model(settings: Settings):
    """Load the base: ``(model, tokenizer, chat_format)``."""
    base, lora = settings.base, settings.lora
    check_quantisation(base, lora)
    if (base.load_in_4bit or base.load_in_8bit) and settings.run.save_full_model:
        raise UserError(
            "--save_full_model True with a quantised base: its weights are rounded; merge afterwards "
            "into the original base, with python load_lora_model.py"
        )
    check_distribution(settings)
    # one process fetches and converts what is no folder, the others find it in place
    base.base_model_path = ranks.in_turns(
        lambda: resolve_base(base.base_model_path, base.accept_license, say)
    )
    check_base_folder(base.base_model_path)
    check_code(base, settings.output_dir, say)
    attention = None if base.attn_implementation == "auto" else base.attn_implementation
    dtype = choose_dtype(settings, say)
    model, tokenizer = load_base(
        base.base_model_path, dtype, attn_implementation=attention,
        trust_remote_code=base.trust_remote_code,
        quantisation=quantisation_config(base, dtype),
    )  # fmt: skip
    tokenizer = prepare_vocabulary(settings, model, tokenizer)
    had_template = has_own_template(tokenizer) or tokenizer.chat_template
    chat_format = chat_format_of(tokenizer)
    if not had_template:
        say("the base brings no chat template: it gets the <|system|> <|user|> <|assistant|> one")
    size = sum(num_elements(parameter) for parameter in model.parameters())
    say(f"base: {base.base_model_path}, {size:,} parameters, {dtype}")
    return model, tokenizer, chat_format


def check_distribution(settings: Settings) -> None:
    """Raise a UserError for starts that need whole weights where DeepSpeed ZeRO-3 splits them."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if settings.lora.moves_base_weights and is_deepspeed_zero3_enabled():
        raise UserError(
            f"--init_lora_weights {settings.lora.init_lora_weights} needs whole weights, and "
            "DeepSpeed ZeRO-3 splits them; use ZERO_STAGE=2"
        )


def prepare_vocabulary(settings: Settings, model, tokenizer):
    """The tokenizer with the tokens that this run adds, or that its adapter brings.

    Raises:
        UserError: the adapter to go on with was made for another base.
    """
    lora, base_tokenizer = settings.lora, tokenizer
    if lora.adapter_path:
        adapter = read_adapter(lora.adapter_path)
        tokenizer = own_tokenizer(adapter) or tokenizer
        fit_vocabulary(model, tokenizer)
        verify_base(adapter.path, settings.base.base_model_path, base_tokenizer, tokenizer)
    if lora.new_special_tokens:
        ids = add_tokens(model, tokenizer, lora.new_special_tokens)
        lora.trainable_token_indices = sorted({*lora.trainable_token_indices, *ids})
        say(f"new tokens: {', '.join(lora.new_special_tokens)} are ids {ids}")
    return tokenizer


def load_examples(settings: Settings, model, chat_format) -> tuple[Data, int]:
    """Read and encode the rows: ``(data, longest example allowed)``."""
    limit = context_length(model)
    max_length = settings.data.max_length or min(USUAL_MAX_LENGTH, limit)
    if max_length > limit:
        raise UserError(
            f"--max_length {max_length}: this base was made for at most {limit} tokens; "
            f"use --max_length {limit}"
        )
    args = settings.training
    shows = not args.disable_tqdm and ranks.is_first()
    # one process prepares and fills the cache, the others find it there
    data = ranks.in_turns(
        lambda: data_stage.load_data(settings.data, chat_format, max_length, args.seed, shows)
    )
    if not settings.run.preview:
        data_stage.require_held_out(data, settings.training.eval_strategy)
    say("data:\n" + data_stage.describe(data))
    return data, max_length


def show_preview(settings: Settings, tokenizer, data: Data) -> None:
    """Print decoded training examples with what is learned marked."""
    if ranks.is_first():
        print(preview(data.train, tokenizer, settings.run.preview, marks_for(sys.stdout)))


def prepare_model(settings: Settings, model):
    """LoRA around the base, or the base itself with every weight trainable."""
    args = settings.training
    if args.device.type == "cpu":
        keep_freed_memory()
        if args.fused_layers and not is_sharded(args):
            use_fused_layers(model)
            if pointwise.library() is None:
                say(
                    "note: no C compiler (cc, gcc or clang) that works: some steps run by PyTorch, slower"
                )
    if not settings.lora.use_lora:
        return model
    if is_sharded(settings.training) and settings.lora.fast_lora:
        # ZeRO-3 fetches a weight when its own module is called, which the faster path does not do
        settings.lora.fast_lora = False
    torch.manual_seed(settings.training.seed)
    lora = add_lora(prepare_quantised(model), settings.lora)
    join_projections(lora)
    if settings.training.gradient_checkpointing:
        lora.enable_input_require_grads()  # else checkpoints of frozen embeddings pass no gradient
    if settings.lora.adapter_path:
        say(describe_adapter(lora, settings.lora.adapter_path))
    lora.peft_config["default"].base_model_name_or_path = settings.base.base_model_path
    return lora


def build_trainer(settings: Settings, model, tokenizer, data: Data, max_length: int) -> SftTrainer:
    """The Trainer with our progress bar in place of its own."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    trainer = SftTrainer(
        model, settings.training, data.train, data.held_out, tokenizer, max_length,
        callbacks=[*watchers(settings, tokenizer, data), CheckSavedAdapter()],
        loraplus_lr_ratio=settings.lora.loraplus_lr_ratio,
    )  # fmt: skip
    if trainer.packing.why:
        say(trainer.packing.why)
    trainer.find_rows = partial(find_rows, settings.data, tokenizer, max_length)
    keep_tensorboard_in(settings.output_dir, trainer)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    check_trainer(settings, trainer, data)
    return trainer


def print_plan(settings: Settings, trainer: SftTrainer, data: Data) -> dict:
    """Say what is about to happen, in numbers; returns them."""
    with one_line_for_faults(settings.output_dir, settings.training, NeverStop()):
        plan = make_plan(settings, trainer, data)
    say(describe_plan(plan, settings, trainer))
    for line in advice(facts_of(settings, trainer, plan)):
        say(f"advice: {line}")
    return plan.to_json()


def dry_run(settings: Settings, model, tokenizer, data: Data, max_length: int) -> None:
    """Print the plan of a run that is not started; no folder is left behind."""
    settings.training.report_to = []
    folder = settings.output_dir
    with run_folder.clear_if_unwritable(folder), leaving_no_folder(folder):
        print_plan(settings, build_trainer(settings, model, tokenizer, data, max_length), data)
    say("dry run: nothing was trained, and no run folder was made")


def train(trainer: SftTrainer, run: Run) -> dict:
    """Train; returns the numbers for ``run.json`` and the model card."""
    trainer.identity, trainer.stop = run.identity, run.stop
    with one_line_for_faults(run.folder, trainer.asked, run.stop):
        return _train(trainer, run)


def _train(trainer: SftTrainer, run: Run) -> dict:
    keep_start(trainer.model, run.folder, trainer.is_world_process_zero())
    has_held_out = trainer.eval_dataset is not None
    before = EvaluateBefore(trainer, loss_before_training(run.folder / run_folder.LOG_FILE))
    if has_held_out and run.resume_from is None:
        before.evaluate()
    with run.stop.defer():
        output = trainer.train(resume_from_checkpoint=run.resume_from)
    peak = peak_bytes(trainer.args.device)  # before anything is saved or measured
    trainer.save_metrics("train", output.metrics)
    after = last_evaluation(trainer) if has_held_out else {}
    if after:
        trainer.save_metrics("eval", after)
    trainer.save_state()
    return {
        "num_steps": trainer.state.global_step,
        "epoch": trainer.state.epoch,
        "train_loss": output.training_loss,
        "train_runtime": output.metrics["train_runtime"],
        "eval_loss_before": before.loss,
        "eval_loss": after.get("eval_loss"),
        "peak_memory_bytes": peak,
        "parameters": count_parameters(trainer.model)[0],
        "device": str(trainer.args.device),
    }


def last_evaluation(trainer: SftTrainer) -> dict:
    """The evaluation of the final weights: the one after the last step, or a new one."""
    state = trainer.state
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        return trainer.evaluate()  # the best weights are back, the last entry is of the last ones
    for entry in reversed(state.log_history):
        if entry["step"] == state.global_step and "eval_loss" in entry:
            return {name: value for name, value in entry.items() if name != "step"}
    return trainer.evaluate()
