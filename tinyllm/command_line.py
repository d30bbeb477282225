"""Command line and YAML to settings: default < YAML (--config) < command line.

Both sources become one list of ``--name value`` words for one parser, so that types, aliases and
unknown names are treated alike and ``2e-4`` in a YAML file is the number it looks like.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from tinyllm.errors import UserError
from tinyllm.settings import (
    BaseSettings,
    DataSettings,
    LoraSettings,
    RunSettings,
    Settings,
    SftArguments,
)

# Other names people type for the same thing: ours, and those of the common toolkits.
SAME_SETTING = {
    "model_name_or_path": "base_model_path",
    "base_model": "base_model_path",
    "dtype": "torch_dtype",
    "dataset_dir_or_path": "dataset",
    "dataset_path": "dataset",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "cutoff_len": "max_length",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "val_dataset": "eval_dataset",
    "val_size": "eval_share",
    "val_set_size": "eval_share",
    "system": "system_prompt",
    "adapter_name_or_path": "adapter_path",
    "additional_target": "modules_to_save",
    "lora_modules_to_save": "modules_to_save",
    "loraplus_ratio": "loraplus_lr_ratio",
}
# Settings whose value is a mapping; any other mapping in a YAML file groups settings.
MAPPINGS = {"rank_pattern", "alpha_pattern", *SftArguments._VALID_DICT_FIELDS}
# Names that older versions of transformers used, and what they are called now.
OLD_NAMES = {
    "warmup_ratio": "warmup_steps",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}


def parse_settings(argv: list[str]) -> tuple[Settings, list[str]]:
    """Parse the words of a command line.

    Returns:
        The settings, and notes to print once (old names that were translated).

    Raises:
        UserError: an unknown name, a value of the wrong type, an unreadable YAML file.
    """
    argv, config = _take_option(argv, "config")
    words = (_words_of_yaml(Path(config)) if config else []) + argv
    words, notes = _translate(words)
    parser = HfArgumentParser(
        [BaseSettings, LoraSettings, DataSettings, RunSettings, SftArguments],
        allow_abbrev=False,
        description=__doc__.split("\n")[0],
    )
    parser.error = _raise_parser_error
    _refuse_unknown(words, parser)
    try:
        return Settings(*parser.parse_args_into_dataclasses(words)), notes
    except UserError:
        raise
    except (ValueError, TypeError) as error:  # what TrainingArguments itself refuses
        raise UserError(f"settings: {str(error).splitlines()[0]}") from error


def _raise_parser_error(message: str) -> None:
    raise UserError(f"settings: {message}; see --help")


def _take_option(argv: list[str], name: str) -> tuple[list[str], str | None]:
    """Take ``--name value`` or ``--name=value`` out of the words."""
    value, rest, words = None, [], iter(argv)
    for word in words:
        if word.split("=", 1)[0] != f"--{name}":
            rest.append(word)
            continue
        value = word.split("=", 1)[1] if "=" in word else next(words, None)
        if value is None:
            raise UserError(f"--{name} needs a value")
    return rest, value


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error instead of a silent last-one-wins."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise UserError(f"line {key.start_mark.line + 1}: {key.value!r} is set twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _words_of_yaml(path: Path) -> list[str]:
    """``{"learning_rate": "2e-4"}`` → ``["--learning_rate", "2e-4"]``; sections may group keys."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: {' '.join(str(error).split())}") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise UserError(
            f"--config {path}: expected 'name: value' lines, got {type(content).__name__}"
        )
    return [word for name, value in content.items() for word in _words_of_entry(name, value)]


def _words_of_entry(name: str, value) -> list[str]:
    if isinstance(value, dict) and name in MAPPINGS:
        return [f"--{name}", json.dumps(value)]
    if isinstance(value, dict):
        return [word for key, inner in value.items() for word in _words_of_entry(key, inner)]
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *(str(item) for item in values)]


def _translate(words: list[str]) -> tuple[list[str], list[str]]:
    """Replace aliases and old names by today's; old ones are reported."""
    out, notes = [], []
    for word in words:
        name, equals, value = word.partition("=")
        key = name[2:].replace("-", "_") if name.startswith("--") else None
        if key == "logging_dir":
            raise UserError("--logging_dir is gone from transformers: set TENSORBOARD_LOGGING_DIR")
        if key == "save_safetensors":
            raise UserError("--save_safetensors is gone: a run writes both .safetensors and .bin")
        if key == "group_by_length":
            raise UserError(
                "--group_by_length is gone: batches here carry no padding, so length does not matter"
            )
        if key in OLD_NAMES:
            notes.append(f"--{key} is now called --{OLD_NAMES[key]}")
            key = OLD_NAMES[key]
        key = SAME_SETTING.get(key, key)
        out.append(f"--{key}{equals}{value}" if key is not None else word)
    return out, notes


def _refuse_unknown(words: list[str], parser: HfArgumentParser) -> None:
    known = {option for action in parser._actions for option in action.option_strings}
    for word in words:
        name = word.split("=", 1)[0]
        if name.startswith("--") and name not in known:
            near = difflib.get_close_matches(name, [*known, *_alias_options()], n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else "; see --help"
            raise UserError(f"unknown setting {name}{hint}")


def _alias_options() -> list[str]:
    return [f"--{name}" for name in (*SAME_SETTING, *OLD_NAMES)]
