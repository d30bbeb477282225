"""A tiny-llm-zh folder → a standard folder that opens without this package.

    python -m tinyllm.convert path/to/last_ptm_model path/to/standard

The result is a Llama with ``attention_bias``.  The family is Qwen2 by structure (biases on q, k and v,
none on o), but in a ``qwen2`` folder AutoTokenizer of transformers 5 builds Qwen's own tokenizer
whatever the files say, and every id is wrong.  A Llama has a bias on o too; it is zero here, so the
function is the same.  The folder is compared with its source before it appears.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tinyllm.base import load_base, read_json
from tinyllm.chat_format import DEFAULT_SYSTEM_PROMPT, FamilyFormat
from tinyllm.errors import UserError, run_program
from tinyllm.family import MODEL_KEY
from tinyllm.quiet import quiet_libraries
from tinyllm.whole_folder import whole_folder

KEPT_SETTINGS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "attention_dropout", "tie_word_embeddings", "rope_parameters", "eos_token_id",
    "pad_token_id",
)  # fmt: skip
# ``</s>`` and ``<unk>`` typed in a text are plain characters to this tokenizer, which no standard
# loader knows how to do.  Under names that nobody types, the two can be ordinary special tokens.
STANDARD_NAMES = {"</s>": "<|endoftext|>", "<unk>": "<|pad|>"}
PROBE_LENGTH = 64
MAX_LOGIT_DIFFERENCE = 1e-4  # of the largest logit
PROBE_TEXTS = (
    "你好，世界！ 123 abc\n",
    "  two spaces\tand a tab",
    "😀龘 philosophy",
    "a <|user|>\nb",
)


def convert(source: str | Path, target: str | Path) -> float:
    """Write ``source`` as a standard folder; ``target`` appears complete or not at all.

    Returns:
        The largest difference of a logit on the probe ids, in float32.

    Raises:
        UserError: ``source`` is no tiny-llm-zh folder, ``target`` exists or cannot be written, or
            what was written does not give the same ids and logits.
    """
    source, target = Path(source), Path(target)
    if target.exists() or target.is_symlink():
        raise UserError(f"{target}: exists already; choose another folder")
    if (source / "config.json").is_file():
        model_type = read_json(source / "config.json").get("model_type")
        if model_type != MODEL_KEY:
            raise UserError(
                f"{source}: a {model_type} model, not a tiny-llm-zh one; use it as it is"
            )
    model, tokenizer = load_base(source, dtype="auto")
    with whole_folder(target) as scratch:
        write_model(model, scratch)
        write_tokenizer(tokenizer, source, scratch)
        difference = compare(model, tokenizer, scratch)
    return difference


def write_model(model, folder: Path) -> None:
    """Write weights and configuration, in the precision in which the source has them."""
    kept = {name: getattr(model.config, name) for name in KEPT_SETTINGS}
    config = LlamaConfig(**kept, attention_bias=True, mlp_bias=False, bos_token_id=None)
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    weights = model.state_dict()
    for name, layer in llama.named_modules():
        if name.endswith(".o_proj"):
            weights[f"{name}.bias"] = torch.zeros(layer.out_features, dtype=model.dtype)
    llama.load_state_dict(weights, assign=True)
    llama.tie_weights()
    llama.generation_config = model.generation_config
    llama.save_pretrained(folder)
    # where programs other than transformers 5 look; a lost one silently becomes 10000
    add_to_json(folder / "config.json", rope_theta=model.config.rope_parameters["rope_theta"])


def write_tokenizer(tokenizer, source: Path, folder: Path) -> None:
    """Write a tokenizer that any loader takes for what it is."""
    standard_tokenizer(tokenizer).save_pretrained(folder)
    listed = AutoTokenizer.from_pretrained(folder).added_tokens_decoder
    add_to_json(
        folder / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        add_bos_token=False,
        added_tokens_decoder={str(i): token.__getstate__() for i, token in listed.items()},
    )
    if (source / "tokenizer.model").is_file():  # the scores that llama.cpp's converter needs
        shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")


def standard_tokenizer(tokenizer) -> PreTrainedTokenizerFast:
    """The same ids, with an end and a padding token that may be looked for in a text."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for part in ("added_tokens", "post_processor"):
        content[part] = renamed(content[part])
    content["model"]["vocab"] = renamed(content["model"]["vocab"])
    content["model"]["unk_token"] = renamed(content["model"]["unk_token"])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        eos_token=renamed(tokenizer.eos_token),
        pad_token=renamed(tokenizer.pad_token),
        unk_token=renamed(tokenizer.unk_token),
        chat_template=tokenizer.chat_template,
        padding_side=tokenizer.padding_side,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def renamed(value):
    """A JSON value with :data:`STANDARD_NAMES` wherever a name stands alone."""
    if isinstance(value, dict):
        return {renamed(key): renamed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [renamed(inner) for inner in value]
    return STANDARD_NAMES.get(value, value) if isinstance(value, str) else value


def add_to_json(path: Path, **more) -> None:
    """Add keys to a JSON file."""
    content = json.dumps(read_json(path) | more, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(content + "\n", encoding="utf-8")


def compare(model, tokenizer, folder: Path) -> float:
    """Open a written folder with transformers alone and compare it with its source.

    Raises:
        UserError: ids or logits differ.
    """
    written = AutoTokenizer.from_pretrained(folder)
    prompt = FamilyFormat(tokenizer).render(
        [{"role": "system", "content": DEFAULT_SYSTEM_PROMPT}], True
    )
    for text in (*PROBE_TEXTS, prompt):
        if written(text).input_ids != tokenizer(text).input_ids:
            raise UserError(f"the written tokenizer gives other ids for {text!r}: nothing is kept")
    expected = probe_logits(model)
    got = probe_logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    difference = (got - expected).abs().max().item()
    if not difference <= MAX_LOGIT_DIFFERENCE * max(1.0, expected.abs().max().item()):
        raise UserError(f"the written model's logits differ by {difference:.2g}: nothing is kept")
    return difference


@torch.inference_mode()
def probe_logits(model) -> torch.Tensor:
    """Logits ``(1, T, vocabulary)`` in float32 for ids spread over the vocabulary."""
    model = model.to(torch.float32).eval()
    length = min(PROBE_LENGTH, model.config.max_position_embeddings)
    return model(torch.linspace(3, model.config.vocab_size - 1, length).long()[None]).logits


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tinyllm.convert",
        description="Write a tiny-llm-zh folder as a standard one.",
    )
    parser.add_argument("source", help="the tiny-llm-zh folder, with its tokenizer")
    parser.add_argument("target", help="a folder that does not exist yet")
    args = parser.parse_args()
    quiet_libraries()
    difference = convert(args.source, args.target)
    print(f"written to {args.target}: same ids, logits within {difference:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
