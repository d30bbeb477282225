"""The record of its base that an adapter carries, and the check of it when the two meet again.

``base_fingerprint.json`` lies beside the adapter; plain peft ignores it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tinyllm.base import load_tokenizer, read_json, resolve_base
from tinyllm.chat_format import chat_format_of
from tinyllm.errors import UserError
from tinyllm.fingerprint import differing_parts, fingerprint, hash_text_side
from tinyllm.golden import first_change, golden_examples
from tinyllm.run_folder import FINGERPRINT_FILE

FORMAT = 1


def base_record(
    base_path: str, tokenizer, system_prompt: str, trust_remote_code: bool = False
) -> dict:
    """What to keep of the base that an adapter was trained on.

    Args:
        base_path: the base; where it lay is a hint for people and never compared.
        tokenizer: the tokenizer of the training, which may have more tokens than the base's.
        system_prompt: the default system prompt of the training.
    """
    folder = resolve_base(base_path)
    base_tokenizer = load_tokenizer(folder, trust_remote_code)
    chat_format_of(base_tokenizer)
    return {
        "format": FORMAT,
        "base_model_path": base_path,
        "base": fingerprint(folder, base_tokenizer),
        "training": hash_text_side(tokenizer),
        "system_prompt": system_prompt,
        "golden": golden_examples(chat_format_of(tokenizer), system_prompt),
    }


def read_record(adapter_folder: Path) -> dict | None:
    """The record of an adapter, or of the run that a checkpoint belongs to; None without one.

    Raises:
        UserError: the file is damaged, or of a later version.
    """
    folders = [adapter_folder]
    if adapter_folder.name.startswith("checkpoint-"):
        folders.append(adapter_folder.parent)
    for folder in folders:
        if (folder / FINGERPRINT_FILE).is_file():
            record = read_json(folder / FINGERPRINT_FILE)
            _check_record(folder / FINGERPRINT_FILE, record)
            return record
    return None


def _check_record(path: Path, record: dict) -> None:
    if record.get("format") != FORMAT:
        raise UserError(f"{path}: format {record.get('format')}, this program knows {FORMAT}")
    kinds = {"base": dict, "training": dict, "golden": list}
    if not all(isinstance(record.get(name), kind) for name, kind in kinds.items()):
        raise UserError(f"{path}: damaged; copy it again, or remove it to load without the check")


def verify_base(
    adapter_folder: Path, base_path: str | Path, base_tokenizer, tokenizer, force: bool = False
) -> bool:
    """Check that an adapter meets the base, tokenizer and template that it was trained with.

    Args:
        base_tokenizer: the tokenizer in the base's folder.
        tokenizer: the one that will encode the prompts; the adapter's own where it brings one.
        force: say what differs instead of stopping.

    Returns:
        Whether there was a record to check; without one that is said on stderr.

    Raises:
        UserError: something differs; the message says what.
    """
    record = read_record(adapter_folder)
    if record is None:
        say(
            f"note: {adapter_folder} carries no fingerprint of its base (it was made elsewhere): "
            "whether it belongs to this base is checked by names and shapes alone"
        )
        return False
    problems = differences(record, base_path, base_tokenizer, tokenizer)
    if not problems:
        return True
    message = f"{adapter_folder}: made for another base than {base_path}: {'; '.join(problems)}"
    if not force:
        raise UserError(
            f"{message}; give the base it was trained on ({record.get('base_model_path')} then), "
            "or force=True (--force) to go on all the same"
        )
    say(f"warning: {message}; going on, as forced")
    return True


def differences(record: dict, base_path: str | Path, base_tokenizer, tokenizer) -> list[str]:
    """What differs between a record and what is here, in words; empty where all agree."""
    chat_format_of(base_tokenizer)  # a base without a template gets ours, as in training
    found = fingerprint(resolve_base(base_path), base_tokenizer)
    problems = [f"other {part}" for part in differing_parts(record["base"], found)]
    chat_format = chat_format_of(tokenizer)
    if tokenizer is not base_tokenizer:
        own = differing_parts(record["training"], hash_text_side(tokenizer))
        problems += [f"the adapter folder's own {part} was changed" for part in own]
    change = first_change(record["golden"], chat_format)
    return [*problems, f"golden ids: {change}"] if change else problems


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
