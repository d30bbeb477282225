"""The finished model folder: what plain transformers, peft, vLLM and llama.cpp open.

Files: config.json, generation_config.json, model.safetensors (bfloat16), tokenizer.json,
tokenizer_config.json, special_tokens_map.json, chat_template.jinja, README.md.
"""

import copy
import logging
import os
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tinyllm import tokenizer_files
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
    # The penalty breaks its loops: without it one reply in seven repeats itself (first_chat.py).
    rounded.generation_config = GenerationConfig(
        do_sample=False, repetition_penalty=1.1, eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )  # fmt: skip
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
    (unfinished / "README.md").write_text(model_card(facts), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)
    log.info("exported to %s", folder)
