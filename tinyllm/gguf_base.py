"""A ``.gguf`` file → a base folder, converted once: dequantised weights, tokenizer, template.

transformers reads the tensors; the rule by which a tokenizer prepares text before its merges is set
here, from the file's own ``tokenizer.ggml.pre`` and ``add_space_prefix``, because transformers takes
the same rule for every model of an architecture.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from tinyllm.errors import UserError
from tinyllm.file_hash import hash_file
from tinyllm.whole_folder import whole_folder

FOLDER = Path("outputs/ckpt")
# How llama.cpp's named rules split text (its file src/llama-vocab.cpp lists them).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def base_of_gguf(file: Path, say, folder: Path = FOLDER) -> Path:
    """The folder of a converted ``.gguf`` file, found by the file's content or made now.

    Raises:
        UserError: gguf is not installed, or the file is no model that can be converted.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; give --base_model_path a .gguf file or a folder")
    digest = hash_file(file)
    target = folder / f"gguf_{file.stem}_{digest[:12]}"
    if (target / "config.json").is_file():
        return target
    check_gguf_package()
    say(f"{file}: converting to {target}, once")
    convert_gguf(file, target)
    return target


def check_gguf_package() -> None:
    """Raise a UserError when the package that reads such files is not installed."""
    if find_spec("gguf") is None:
        raise UserError(
            "a .gguf file needs the package gguf: pip install -r requirement-gguf.txt, then again"
        )


def convert_gguf(
    file: Path,
    target: Path,
    chat_template: str | None = None,
    extra_files: dict[str, bytes] | None = None,
) -> None:
    """Write the base folder of a ``.gguf`` file: safetensors in bfloat16, whole or not at all.

    Args:
        chat_template: for a model that brings none.
        extra_files: further files of the folder, by name.

    Raises:
        UserError: transformers cannot read the file, or its tokenizer splits text by an unknown rule.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    fields = read_fields(file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except Exception as error:  # gguf, torch, tokenizers and transformers each have their own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{file}: transformers cannot read it: {reason}") from error
    set_splitting(tokenizer, fields, file)
    if chat_template and not tokenizer.chat_template:
        tokenizer.chat_template = chat_template
    forget_quantisation(model)
    with whole_folder(target) as scratch:
        model.to(torch.bfloat16).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for name, content in (extra_files or {}).items():
            (scratch / name).write_bytes(content)


def read_fields(file: Path) -> dict[str, str | bool]:
    """The fields of a ``.gguf`` file that say how its tokenizer works.

    Raises:
        UserError: it is no such file, or is cut short.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        names = ("model", "pre", "add_space_prefix")
        found = {n: reader.get_field(n) for n in (f"tokenizer.ggml.{name}" for name in names)}
        return {name: field.contents() for name, field in found.items() if field is not None}
    except Exception as error:  # numpy's and struct's errors of a damaged file
        raise UserError(f"{file}: no complete .gguf file: {error}") from error


def set_splitting(tokenizer, fields: dict[str, str | bool], file: Path) -> None:
    """Give a tokenizer the file's own rule for what is done to text before its merges.

    Raises:
        UserError: the rule is not known here, so that ids would be wrong without a word.
    """
    if fields.get("tokenizer.ggml.model") != "gpt2":
        set_spaces(tokenizer, fields.get("tokenizer.ggml.add_space_prefix"))
        return
    from tokenizers import Regex, pre_tokenizers

    def byte_level(use_regex: bool):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)

    def split(pattern: str):
        cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return pre_tokenizers.Sequence([cut, byte_level(False)])

    digits = pre_tokenizers.Digits(individual_digits=True)
    rules = {
        "gpt-2": byte_level(True),
        "smollm": pre_tokenizers.Sequence([digits, byte_level(True)]),
        "llama-bpe": split(LLAMA3_SPLIT),
        "qwen2": split(QWEN2_SPLIT),
    }
    rule = fields.get("tokenizer.ggml.pre", "gpt-2")
    if rule not in rules:
        raise UserError(
            f"{file}: its tokenizer splits text by the rule {rule!r}, known are "
            f"{', '.join(rules)}; use the model's own folder (safetensors, tokenizer.json) instead"
        )
    tokenizer.backend_tokenizer.pre_tokenizer = rules[rule]


def set_spaces(tokenizer, prefix: bool | None) -> None:
    """Write the spaces of a SentencePiece vocabulary as llama.cpp does: one before each stretch of
    text between markers, or none.

    transformers puts one before the very first stretch whatever the file says; Gemma's and Phi-3's
    tokenizers, which it builds otherwise, and files that say nothing are left to it.
    """
    from tokenizers import normalizers, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if prefix is None or not isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        return
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None


def forget_quantisation(model) -> None:
    """A dequantised model is an ordinary one: its config must not name the file it came from."""
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config._name_or_path = ""
    model.hf_quantizer, model.is_quantized = None, False
