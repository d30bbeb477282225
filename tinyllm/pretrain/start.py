"""Begin from the weights of an exported folder, where there are no checkpoints: with fresh optimizers.

The folder's ``pretraining.json`` tells what the weights have seen, so that the next model card counts on from there.
"""

import json
import logging
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tinyllm.errors import UserError
from tinyllm.pretrain.schedule import Progress

log = logging.getLogger(__name__)

RECORD = "pretraining.json"  # beside the weights: steps, tokens, seconds, tokens by source


def record_of(facts: dict) -> dict:
    """What of the facts of the model card a later run goes on counting from."""
    return {name: facts[name] for name in ("steps", "tokens", "seconds", "seen")}


def read_record(folder: Path) -> tuple[Progress, dict[str, int]]:
    """Progress and the tokens seen by source; all at zero, and said so, where the folder does not tell."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        log.info("%s has no %s: what it saw before is not counted", folder, RECORD)
        return Progress(), {}
    progress = Progress(record["steps"], record["tokens"], record["seconds"])
    return progress, dict(record["seen"])


def adopt_tokenizer(start_from: str, folder: Path) -> None:
    """Make the tokenizer of the exported folder that of the run, which its weights depend on.

    Raises:
        UserError: the folder has none, or the run has another one already.
    """
    if not (Path(start_from) / "tokenizer.json").is_file():
        raise UserError(
            f"--start_from {start_from}: expected an exported folder with tokenizer.json"
        )
    theirs = PreTrainedTokenizerFast.from_pretrained(start_from)
    if not (folder / "tokenizer.json").exists():
        theirs.save_pretrained(folder)
        log.info("vocabulary: that of %s", start_from)
    elif PreTrainedTokenizerFast.from_pretrained(folder).get_vocab() != theirs.get_vocab():
        raise UserError(
            f"--start_from {start_from}: its tokenizer is not that of {folder}; give --work another folder"
        )


def load_weights(model: LlamaForCausalLM, start_from: str) -> None:
    """Put the weights of the exported folder into a model of the same shape, in its own precision.

    Raises:
        UserError: they cannot be read, or are of another shape.
    """
    try:
        theirs = LlamaForCausalLM.from_pretrained(start_from, dtype=torch.float32).state_dict()
    except (OSError, ValueError) as error:
        raise UserError(f"--start_from {start_from}: {str(error).splitlines()[0]}") from error
    ours = model.state_dict()
    differing = [
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape
    ]
    if differing:
        raise UserError(
            f"--start_from {start_from}: its {min(differing)} and {len(differing) - 1} more are not of "
            "the shape that the settings ask for"
        )
    model.load_state_dict(theirs)
