"""Merged model → a Hugging Face folder, with the certificate of its merge."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from tinyllm import run_folder
from tinyllm.base import load_base, pick_dtype
from tinyllm.certificate import certificate, certify
from tinyllm.errors import UserError
from tinyllm.export.card import merged_card
from tinyllm.export.source import Merged, Source, check_target, merge_source
from tinyllm.merge import cast_weights
from tinyllm.tokenizer_files import save_tokenizer
from tinyllm.whole_folder import whole_folder

SAVE_FORMATS = ("safetensors", "bin")
BIN_WEIGHTS = "pytorch_model.bin"


def export_hf(
    source: Source, target: Path, torch_dtype: str = "float32", save_format: str = "safetensors"
) -> dict:
    """Merge, write, read back, compare; the folder appears when all of that went well.

    Args:
        torch_dtype: precision of the written weights: float32, bfloat16 or float16.
        save_format: ``safetensors``, or ``bin`` for ``pytorch_model.bin``.

    Returns:
        The certificate, as ``merge_certificate.json`` in the folder holds it.

    Raises:
        UserError: the two do not belong together, cannot be merged, or the merged model differs
            from the adapter by more than its precision explains; then nothing is written.
    """
    check_target(target)
    merged = merge_source(source)
    with whole_folder(target) as scratch:
        model = cast_weights(merged.model, pick_dtype(torch_dtype, torch.device("cpu")))
        save_merged(model, merged.tokenizer, scratch, save_format)
        again, _ = load_base(scratch, torch.float32, trust_remote_code=source.trust_remote_code)
        check_same_weights(model, again)
        reloaded = certify(merged.reference, again, merged.probes, "reloaded", torch_dtype)
        content = write_certificate(merged, reloaded, torch_dtype, scratch)
        card = merged_card(content, target)
        (scratch / run_folder.MODEL_CARD).write_text(card, encoding="utf-8")
    return content


def check_same_weights(written, read) -> None:
    """Raise a UserError unless a file holds bit for bit the weights that were to be written.

    Args:
        written: the model in the precision of the file.
        read: the same model read back, in float32.
    """
    found = dict(read.named_parameters())
    for name, parameter in written.named_parameters():
        if name not in found or not torch.equal(found[name], parameter.float()):
            raise UserError(f"nothing was written: read back, {name} is not what was merged")


def write_certificate(merged: Merged, reloaded, precision: str, folder: Path) -> dict:
    """Write ``merge_certificate.json`` and return its content."""
    comparisons = {"merged": merged.comparison, "reloaded": reloaded}
    content = certificate(merged.facts, precision, len(merged.probes), comparisons)
    run_folder.write_json(folder / run_folder.CERTIFICATE, content)
    return content


def save_merged(model, tokenizer, folder: Path, save_format: str = "safetensors") -> None:
    """Write a model and its tokenizer into a folder, each weight in the precision it has.

    ``save_pretrained`` of transformers 5 writes safetensors whatever it is told, so a ``.bin`` is
    written here.
    """
    if save_format not in SAVE_FORMATS:
        raise UserError(f"--save_format {save_format}: expected one of {', '.join(SAVE_FORMATS)}")
    if save_format == "bin":
        config = copy.deepcopy(model.config)
        config.dtype, config.architectures = model.dtype, [type(model).__name__]
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / BIN_WEIGHTS)
    else:
        model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
