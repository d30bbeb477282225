"""Every setting of a training run, once: name, default and help.

The training settings are Hugging Face's ``TrainingArguments`` with defaults for LoRA on a small
model; the rest is ours.  Names, aliases and YAML are handled in ``command_line.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import TrainingArguments

from tinyllm.base_settings import BaseSourceSettings
from tinyllm.chat_format import DEFAULT_SYSTEM_PROMPT
from tinyllm.errors import UserError
from tinyllm.formats import KNOWN_COLUMNS
from tinyllm.lora_settings import LoraVariantSettings, check_combination
from tinyllm.report.settings import ReportSettings, loggers
from tinyllm.setting import setting

EMBEDDED_BASE = "outputs/ckpt/ptm_tiny_llm_16m_epoch1/last_ptm_model"
DEFAULT_RUN = "outputs/ckpt/sft_lora_tiny_llm_16m_epoch3"
USUAL_MAX_LENGTH = 512
MAX_SAMPLE_REPLIES = 50
# Settings of TrainingArguments that act in parts of the Trainer which ours replaces.
UNSUPPORTED = ("label_smoothing_factor", "auto_find_batch_size", "torch_empty_cache_steps", "fsdp")
DEFAULT_TARGETS = ("q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class BaseSettings(BaseSourceSettings):
    """Which base model to train on."""

    base_model_path: str = setting(
        EMBEDDED_BASE,
        "The base: a folder with model and tokenizer, a .gguf file, or the name of a small model "
        "that pip can bring (smollm2-135m, gemma3-270m).",
    )
    torch_dtype: str = setting(
        "auto",
        "Precision of the base's weights: auto, float32, bfloat16 or float16. auto is bfloat16 on a "
        "GPU that has it, and on a CPU that multiplies it in hardware if the base is stored in it; else "
        "float32. LoRA weights are always float32.",
    )
    attn_implementation: str = setting(
        "auto", "Attention of transformers: auto, sdpa, eager, flash_attention_2, ..."
    )
    trust_remote_code: bool = setting(
        False, "Run Python code that lies in the base's folder. Only for folders you trust."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = ("auto", "float32", "bfloat16", "float16")
        if self.torch_dtype not in allowed:
            raise UserError(
                f"--torch_dtype {self.torch_dtype}: expected one of {', '.join(allowed)}"
            )


@dataclass
class LoraSettings(LoraVariantSettings):
    """What to train: a LoRA (Hu et al. 2021, arXiv:2106.09685), or the whole model."""

    use_lora: bool = setting(True, "Train a LoRA adapter; False trains every weight of the model.")
    lora_r: int = setting(16, "Rank of the adapter matrices.")
    lora_alpha: int = setting(32, "Scale of the adapter: its output is multiplied by alpha / r.")
    lora_dropout: float = setting(0.1, "Dropout on the adapter's input while training.")
    lora_target_modules: list[str] = setting(
        list(DEFAULT_TARGETS), "Linear layers to adapt, comma or space separated, or all-linear."
    )
    fast_lora: bool = setting(
        True, "On a CPU, compute plain LoRA layers in fewer passes; False uses peft's own forward."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [name.strip() for part in self.lora_target_modules for name in part.split(",")]
        self.lora_target_modules = [name for name in names if name]
        if self.lora_r < 1:
            raise UserError(f"--lora_r {self.lora_r}: the rank must be 1 or more, 8 or 16 is usual")
        if self.lora_alpha < 1:
            raise UserError(
                f"--lora_alpha {self.lora_alpha}: must be 1 or more, 2 x lora_r is usual"
            )
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout {self.lora_dropout}: must be in [0, 1), 0.05 is usual")
        if not self.lora_target_modules:
            raise UserError(
                "--lora_target_modules is empty: name at least one layer, or all-linear"
            )
        check_combination(self)


@dataclass
class DataSettings:
    """What to learn from."""

    dataset: list[str] = setting(
        ["data/sft_train"],
        "Training rows: files or folders of .jsonl, .json, .csv, .tsv or .parquet (the texts also as "
        ".gz, .bz2, .xz), comma or space separated. A number behind a colon is a weight: a.jsonl:2 "
        "is seen twice in an epoch, b.jsonl:0.5 by half.",
    )
    eval_dataset: list[str] = setting(
        ["auto"],
        "Held-out rows: files or folders, 'auto' (our own held-out file for our own data, a share "
        "of the training rows otherwise), or 'none'.",
    )
    eval_share: float = setting(
        0.02, "Share of the training rows held out when 'auto' splits them."
    )
    system_prompt: str = setting(
        DEFAULT_SYSTEM_PROMPT, "System prompt of rows that bring none; '' for no system turn."
    )
    max_length: int = setting(
        0,
        f"Longest example in tokens; 0 for {USUAL_MAX_LENGTH}, or the base's limit if that is less.",
    )
    bad_rows: str = setting("error", "What to do with a row that cannot be used: error or skip.")
    columns: list[str] = setting(
        [],
        "Names of columns that are not ours, as ours=theirs, comma or space separated: "
        "question=prompt_text,answer=reply.",
    )
    train_on: str = setting(
        "all",
        "Which assistant turns are learned: all, or only the last. A message with 'train': false "
        "(or 'weight': 0) is left out in any case.",
    )
    data_cache: str = setting(
        "outputs/cache",
        "Folder that keeps large data encoded for the next start (it may be deleted at any time); "
        "none keeps nothing.",
    )
    overlong: str = setting(
        "error",
        "What to do with an example over max_length: error, drop, or shorten (oldest whole turns "
        "first, then the middle of the prompt, never the answer).",
    )

    def __post_init__(self) -> None:
        self.dataset = _split_at_commas(self.dataset)
        self.eval_dataset = _split_at_commas(self.eval_dataset)
        self.columns = _split_at_commas(self.columns)
        for pair in self.columns:
            _check_column(pair)
        if not self.dataset:
            raise UserError("--dataset is empty: give at least one file or folder")
        if self.bad_rows not in ("error", "skip"):
            raise UserError(f"--bad_rows {self.bad_rows}: expected error or skip")
        if self.overlong not in ("error", "drop", "shorten"):
            raise UserError(f"--overlong {self.overlong}: expected error, drop or shorten")
        if not 0 < self.eval_share < 1:
            raise UserError(f"--eval_share {self.eval_share}: must lie between 0 and 1")
        if self.max_length < 0:
            raise UserError(f"--max_length {self.max_length}: must be 0 or more")
        if self.train_on not in ("all", "last"):
            raise UserError(f"--train_on {self.train_on}: expected all or last")
        if not _is_text(self.system_prompt):
            raise UserError("--system_prompt is not UTF-8 text")

    @property
    def column_names(self) -> dict[str, str]:
        """Our name of a column → its name in the files."""
        return dict(tuple(pair.split("=", 1)) for pair in self.columns)


def _split_at_commas(words: list[str]) -> list[str]:
    return [part.strip() for word in words for part in word.split(",") if part.strip()]


def _check_column(pair: str) -> None:
    ours, equals, theirs = pair.partition("=")
    if not equals or not theirs:
        raise UserError(f"--columns {pair}: expected ours=theirs, as in question=prompt_text")
    if ours not in KNOWN_COLUMNS:
        raise UserError(
            f"--columns {pair}: {ours!r} is no column of ours; expected one of "
            f"{', '.join(sorted(KNOWN_COLUMNS))}"
        )


def _is_text(text: str) -> bool:
    """Whether it can be encoded: bytes on a command line that are no text become half characters."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


@dataclass
class RunSettings(ReportSettings):
    """What becomes of the run folder, and what a run says about itself."""

    overwrite_output_dir: bool = setting(
        False, "Start anew: an earlier run in output_dir is moved aside to output_dir.old-N."
    )
    save_full_model: bool = setting(
        False, "Also write pytorch_model.bin: the whole model with the adapter merged into it."
    )
    num_sample_replies: int = setting(3, "Replies shown at the end, to held-out questions.")
    verify_resume: bool = setting(
        False,
        "Train six steps straight, and six with an interruption after three, compare every bit, and "
        "train nothing else.",
    )
    preview: int = setting(
        0, "Show this many decoded examples, with what is learned marked, and train nothing."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.num_sample_replies <= MAX_SAMPLE_REPLIES:
            raise UserError(
                f"--num_sample_replies {self.num_sample_replies}: expected 0 to {MAX_SAMPLE_REPLIES}"
            )
        if self.preview < 0:
            raise UserError(f"--preview {self.preview}: must be 0 or more")


@dataclass
class SftArguments(TrainingArguments):
    """Hugging Face's TrainingArguments with our defaults; each keeps its Hugging Face meaning."""

    output_dir: str = setting(DEFAULT_RUN, "Run folder.")
    per_device_train_batch_size: int = setting(4, "Rows per device and micro-batch (MBS).")
    gradient_accumulation_steps: int = setting(4, "Micro-batches per optimizer step (GAS).")
    per_device_eval_batch_size: int = setting(16, "Rows per device and evaluation batch.")
    learning_rate: float = setting(5e-4, "Peak learning rate (LR).")
    num_train_epochs: float = setting(3.0, "Passes over the training rows (TRAIN_EPOCHS).")
    lr_scheduler_type: str = setting("cosine", "Shape of the learning rate after the warm-up.")
    warmup_steps: float = setting(0.03, "Warm-up: a number of steps, or below 1 a share of them.")
    weight_decay: float = setting(0.0, "AdamW weight decay.")
    logging_steps: float = setting(10, "Optimizer steps between two log lines.")
    eval_strategy: str = setting("epoch", "When to evaluate: no, steps or epoch.")
    save_strategy: str = setting("epoch", "When to write a checkpoint: no, steps or epoch.")
    save_total_limit: int | None = setting(2, "Checkpoints kept; older ones are deleted.")
    chunked_loss: bool = setting(
        True, "Compute the loss under a frozen head a few positions at a time; False all at once."
    )
    fused_layers: bool = setting(
        True, "On a CPU, run norms, gates and attention in compiled code; False: transformers' own."
    )
    fill_rows: bool = setting(
        True,
        "On a CPU in bfloat16, where oneDNN multiplies, fill micro-batches up to a multiple of 64 "
        "tokens, with no effect on the loss: less memory, and faster.",
    )
    report_to: list[str] = setting(
        ["auto"],
        "Loggers: tensorboard, wandb, swanlab, trackio, mlflow, ..., none; auto is tensorboard where "
        "it is installed.",
    )
    logging_nan_inf_filter: bool = setting(False, "Hide NaN losses from the log (never do).")

    def __post_init__(self) -> None:
        self.report_to = loggers(self.report_to)
        for name in UNSUPPORTED:
            if getattr(self, name):
                raise UserError(
                    f"--{name} has no effect on this project's training step; leave it out"
                )
        self._refuse_steps_of_no_use()
        super().__post_init__()

    def _refuse_steps_of_no_use(self) -> None:
        """Steps are heeded by the strategy "steps" only; transformers says nothing otherwise."""
        for what in ("save", "eval"):
            strategy, steps = getattr(self, f"{what}_strategy"), getattr(self, f"{what}_steps")
            if steps != getattr(TrainingArguments, f"{what}_steps") and strategy != "steps":
                raise UserError(
                    f"--{what}_steps {steps:g} has no effect with --{what}_strategy {strategy}; "
                    f"expected --{what}_strategy steps beside it"
                )


@dataclass
class Settings:
    """All settings of one run."""

    base: BaseSettings
    lora: LoraSettings
    data: DataSettings
    run: RunSettings
    training: SftArguments

    @property
    def output_dir(self) -> Path:
        return Path(self.training.output_dir)
