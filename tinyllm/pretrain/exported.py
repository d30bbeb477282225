"""An exported folder read back: to begin from its weights with fresh optimizers, and to average with them.

Its ``pretraining.json`` tells what the weights have seen, so that the next model card counts on from there.
"""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tinyllm.base import load_base, read_json
from tinyllm.errors import UserError
from tinyllm.fingerprint import hash_tokenizer
from tinyllm.pretrain.model import build_config
from tinyllm.pretrain.schedule import Progress
from tinyllm.pretrain.settings import Settings
from tinyllm.whole_folder import whole_folder

log = logging.getLogger(__name__)

RECORD = "pretraining.json"  # beside the weights: steps, tokens, seconds, tokens by source
ARCHITECTURE = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters", "rms_norm_eps",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act",
)  # fmt: skip


@dataclass
class History:
    """What weights have seen, over all runs that they went through.

    Attributes:
        seen: tokens by source.
        own_texts: the folders of `--own_text`.
    """

    progress: Progress
    seen: dict[str, int]
    own_texts: list[str]


@dataclass
class Exported:
    """What an exported folder holds, its weights in float32."""

    folder: str
    weights: dict[str, torch.Tensor]
    tokenizer: PreTrainedTokenizerFast
    history: History


def read_exported(settings: Settings) -> Exported:
    """Read the folder of `--start_from`.

    Raises:
        UserError: it cannot be read, or is not of the architecture that the settings ask for.
    """
    option, folder = f"--start_from {settings.start_from}", Path(settings.start_from)
    if not folder.is_dir():
        raise UserError(f"{option}: no such folder")
    try:
        model, tokenizer = load_base(folder, torch.float32)
    except UserError as error:
        raise UserError(f"--start_from: {error}") from error
    wanted, found = build_config(settings).to_dict(), model.config.to_dict()
    for name in ARCHITECTURE:
        if found.get(name) != wanted[name]:
            raise UserError(
                f"{option}: its {name} is {found.get(name)}, the settings ask for {wanted[name]}"
            )
    return Exported(settings.start_from, model.state_dict(), tokenizer, read_record(folder))


def record_of(facts: dict) -> dict:
    """What of the facts of the model card a later run goes on counting from."""
    return {name: facts[name] for name in ("steps", "tokens", "seconds", "seen", "own_texts")}


def read_record(folder: Path) -> History:
    """What the weights of a folder have seen; nothing, and said so, where the folder does not tell.

    Raises:
        UserError: the record is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        log.info("%s has no %s: what it saw before is not counted", folder, RECORD)
        return History(Progress(), {}, [f"what {folder} saw"])
    record = read_json(path)
    try:
        steps, seen = int(record["steps"]), {k: int(v) for k, v in record["seen"].items()}
        progress = Progress(steps, int(record["tokens"]), float(record["seconds"]), start=steps)
        own_texts = record.get("own_texts", [f"what {folder} saw"])
        if not isinstance(own_texts, list):
            raise TypeError(own_texts)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"{path}: expected the numbers steps, tokens and seconds, seen with tokens by source, and the list "
            "own_texts; without the file nothing is counted"
        ) from None
    return History(progress, seen, own_texts)


def adopt_tokenizer(exported: Exported, folder: Path) -> PreTrainedTokenizerFast:
    """Make the tokenizer of the exported folder, which its weights depend on, that of the run.

    Raises:
        UserError: the run has another one already.
    """
    if (folder / "tokenizer.json").exists():
        ours = PreTrainedTokenizerFast.from_pretrained(folder)
        if hash_tokenizer(exported.tokenizer) != hash_tokenizer(ours):
            raise UserError(
                f"--start_from {exported.folder}: its tokenizer is not that of {folder}; give --work another folder"
            )
    elif os.environ.get("RANK", "0") == "0":  # the others have it in memory
        with whole_folder(folder) as scratch:
            exported.tokenizer.save_pretrained(scratch)
        log.info("vocabulary: that of %s", exported.folder)
    return exported.tokenizer


def between(
    model: LlamaForCausalLM, start: dict[str, torch.Tensor], share: float
) -> LlamaForCausalLM:
    """A model whose weights lie between the model's and those it began from, of which they have ``share``
    (Wortsman et al. 2022, arXiv:2109.01903).
    """
    found, now = copy.deepcopy(model), model.state_dict()
    found.load_state_dict({n: (1 - share) * w + share * start[n].to(w) for n, w in now.items()})
    return found
