"""Merged model → one GGUF file, for llama.cpp, Ollama and transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tinyllm import run_folder
from tinyllm.certificate import certify
from tinyllm.errors import UserError
from tinyllm.export.card import gguf_card
from tinyllm.export.gguf_gemma3 import add_gemma3
from tinyllm.export.gguf_names import (
    architecture_of,
    gguf_name,
    gguf_package,
    reorder_heads,
    ropes_of,
)
from tinyllm.export.gguf_tokenizer import add_tokenizer, check_tokenizer
from tinyllm.export.hf import write_certificate
from tinyllm.export.ollama import modelfile
from tinyllm.export.source import Source, check_target, merge_source
from tinyllm.tokenizer_files import save_tokenizer
from tinyllm.whole_folder import whole_folder

GGUF_TYPES = {"f32": "float32", "f16": "float16", "q8_0": "q8_0"}
F16_MAX = 65504.0


def export_gguf(
    source: Source, target: Path, gguf_type: str = "f16", with_modelfile: bool = False
) -> dict:
    """Merge and write a folder with the ``.gguf`` file, the tokenizer, the certificate and a card.

    Args:
        gguf_type: precision of the matrices: f32, f16 or q8_0 (8 bits, blocks of 32).
        with_modelfile: also write the ``Modelfile`` of Ollama.

    Returns:
        The certificate; transformers reads the file back for it.

    Raises:
        UserError: as for a Hugging Face folder, or GGUF has no place for this model or tokenizer.
    """
    gguf_package()
    check_target(target)
    merged = merge_source(source)
    architecture_of(merged.model.config)
    check_tokenizer(merged.tokenizer)
    name = f"{target.name}-{gguf_type}.gguf"
    with whole_folder(target) as scratch:
        write_gguf(merged.model, merged.tokenizer, scratch / name, gguf_type)
        again = read_gguf(scratch, name)
        precision = GGUF_TYPES[gguf_type]
        reloaded = certify(merged.reference, again, merged.probes, "reloaded", precision)
        save_tokenizer(merged.tokenizer, scratch)
        content = write_certificate(merged, reloaded, precision, scratch)
        if with_modelfile:
            text = modelfile(
                name,
                merged.tokenizer,
                merged.facts.get("system_prompt"),
                merged.model.generation_config,
            )
            (scratch / "Modelfile").write_text(text, encoding="utf-8")
        card = gguf_card(content, target, name, with_modelfile)
        (scratch / run_folder.MODEL_CARD).write_text(card, encoding="utf-8")
    return content


def read_gguf(folder: Path, name: str):
    """Read a GGUF file with transformers, as a float32 model in evaluation mode.

    Raises:
        UserError: transformers takes it for a model of another shape (it knows fewer of the numbers
            than llama.cpp: Qwen3 with heads of other than 128 values, for one).
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: transformers cannot read it back: {reason}") from error
    return model.eval()


def write_gguf(model, tokenizer, path: Path, gguf_type: str = "f16") -> None:
    """Write a model and its tokenizer as one GGUF file.

    Raises:
        UserError: GGUF has no place for this model, its tokenizer, or a weight.
    """
    if gguf_type not in GGUF_TYPES:
        raise UserError(f"--gguf_type {gguf_type}: expected one of {', '.join(GGUF_TYPES)}")
    gguf, architecture = gguf_package(), architecture_of(model.config)
    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        add_shape(writer, model.config, path.stem)
        writer.add_file_type(_file_type(gguf, gguf_type))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_tokenizer(writer, tokenizer, model.config.vocab_size)
        tied = model.config.tie_word_embeddings
        for name, tensor in model.state_dict().items():
            if not (tied and name == "lm_head.weight"):
                add_weight(writer, name, tensor, model.config, gguf_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def add_shape(writer, config, name: str) -> None:
    """Write the numbers of a configuration."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(ropes_of(config)[0]["rope_theta"]))
    if architecture_of(config).name == "gemma3":
        add_gemma3(writer, config)


def add_weight(writer, name: str, tensor: torch.Tensor, config, gguf_type: str) -> None:
    """Write one tensor: matrices in the type asked for, the rest in float32."""
    gguf, architecture = gguf_package(), architecture_of(config)
    place = gguf_name(name, architecture)
    if place is None:
        raise UserError(f"GGUF has no place for the tensor {name} of this model")
    rows = reorder_heads(name, tensor.detach().float(), config, architecture)
    if name.endswith("norm.weight"):
        rows = rows + architecture.norm_offset
    values = np.ascontiguousarray(rows.numpy())
    if values.ndim == 1 or gguf_type == "f32":
        writer.add_tensor(place, values)
    elif gguf_type == "q8_0" and values.shape[-1] % gguf.GGML_QUANT_SIZES[_q8_0(gguf)][0] == 0:
        quantised = gguf.quants.quantize(values, _q8_0(gguf))
        writer.add_tensor(place, quantised, raw_dtype=_q8_0(gguf))
    elif np.abs(values).max() > F16_MAX:
        raise UserError(f"GGUF: {name} holds values beyond float16; use --gguf_type f32")
    else:  # rows that are no multiple of a block stay in float16, as in llama.cpp
        writer.add_tensor(place, values.astype(np.float16))


def _q8_0(gguf):
    return gguf.GGMLQuantizationType.Q8_0


def _file_type(gguf, gguf_type: str):
    types = gguf.LlamaFileType
    return {"f32": types.ALL_F32, "f16": types.MOSTLY_F16, "q8_0": types.MOSTLY_Q8_0}[gguf_type]
