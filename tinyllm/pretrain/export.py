"""The finished model folder: what plain transformers, peft, vLLM and llama.cpp open.

Files: config.json, generation_config.json, model.safetensors (bfloat16), tokenizer.json,
tokenizer_config.json, chat_template.jinja, README.md, and pretraining.json, which
a later run goes on from (`--start_from`).
"""

import copy
import json
import logging
import os
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tinyllm import tokenizer_files
from tinyllm.pretrain.exported import RECORD, record_of
from tinyllm.pretrain.model_card import model_card
from tinyllm.pretrain.vocabulary import chat_template

log = logging.getLogger(__name__)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Tokenizer files under the names that transformers 4 and 5 both read, with the chat template
    of today.
    """
    if template := chat_template():
        tokenizer.chat_template = template
    tokenizer_files.save_tokenizer(tokenizer, folder)


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Weights in bfloat16, and the settings for generation."""
    rounded = copy.deepcopy(model).to(device="cpu", dtype=torch.bfloat16)
    # Greedy: a small model's likeliest word is its best one, and replies are the same every time.
    # No repetition penalty: it counts the question, too, and so makes a reply avoid the very thing
    # that was said, a kitten becomes a puppy.
    rounded.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    rounded.save_pretrained(folder)
    os.chmod(folder / "model.safetensors", 0o644)


def export(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: dict, folder: Path
) -> None:
    """Write the whole folder beside its place, then put it there; an older one is replaced.

    `facts` is what the model card says: see `model_card`.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_model(model, unfinished)
    save_tokenizer(tokenizer, unfinished)
    record = json.dumps(record_of(facts), indent=2) + "\n"
    (unfinished / RECORD).write_text(record, encoding="utf-8")
    (unfinished / "README.md").write_text(model_card(facts), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)
    log.info("exported to %s", folder)
