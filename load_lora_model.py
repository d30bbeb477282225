"""Load a LoRA adapter with its base, merged or not.

In Python:

    from load_lora_model import load_lora_model, load_lora_model_without_merge
    model, tokenizer = load_lora_model("path/to/base", "path/to/adapter")

As a program, to see what an adapter is, or to merge it into a folder that stands alone:

    python load_lora_model.py --lora_model path/to/adapter
    python load_lora_model.py --base_model path/to/base --lora_model path/to/adapter \\
        --output_dir path/to/merged
"""

from __future__ import annotations

import argparse
import sys

from tinyllm.base_settings import BASE_KINDS, add_license_flag
from tinyllm.errors import UserError, run_program


def load_lora_model(
    base_model_path: str,
    lora_model_path: str,
    device: str = "auto",
    torch_dtype: str = "auto",
    trust_remote_code: bool = False,
    force: bool = False,
    quantize: str | None = None,
    accept_license: bool = False,
):
    """Load a base, merge an adapter into it, and return both ready for inference.

    Args:
        base_model_path: the base that the adapter was trained on: a folder, a ``.gguf`` file, or a
            name in :mod:`tinyllm.known_bases`.
        lora_model_path: adapter folder, with ``.safetensors`` or ``.bin`` weights.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, ...
        torch_dtype: ``auto`` (bfloat16 on a GPU that has it, else float32) or a dtype's name.
        trust_remote_code: run Python code that lies in the base's folder.
        force: go on (with a warning) where base and adapter do not belong together.
        quantize: ``int8`` or ``int4``: quantise the merged weights for inference.
        accept_license: you accept the licence of a base that is fetched by its name.

    Returns:
        ``(model, tokenizer)``: a plain transformers model with the adapter in its weights.

    Raises:
        ValueError: a folder is missing, damaged, or the two do not belong together.
    """
    from tinyllm.adapter import load_adapter_on_base, merge
    from tinyllm.base import pick_device, pick_dtype

    lora, tokenizer = load_adapter_on_base(
        base_model_path, lora_model_path, device, "float32",
        trust_remote_code=trust_remote_code, force=force, accept_license=accept_license,
    )  # fmt: skip
    model = merge(lora, pick_dtype(torch_dtype, pick_device(device)))
    if quantize:
        from tinyllm.quantize import quantize as quantize_weights

        quantize_weights(model, quantize)
    return model, tokenizer


def load_lora_model_without_merge(
    base_model_path: str,
    lora_model_path: str,
    device: str = "auto",
    torch_dtype: str = "auto",
    is_trainable: bool = False,
    trust_remote_code: bool = False,
    force: bool = False,
    quantize: str | None = None,
    accept_license: bool = False,
):
    """Load a base with an adapter beside it.

    Args:
        is_trainable: True to train the adapter further.
        quantize: quantise the base's weights, not the adapter; the others as in
            :func:`load_lora_model`.

    Returns:
        ``(model, tokenizer)``: a ``peft.PeftModel``.

    Raises:
        ValueError: a folder is missing, damaged, or the two do not belong together.
    """
    from tinyllm.adapter import load_adapter_on_base

    return load_adapter_on_base(
        base_model_path, lora_model_path, device, torch_dtype, is_trainable, trust_remote_code,
        force, quantize, accept_license,
    )  # fmt: skip


def load_lora_adapters(base_model_path: str, adapters: dict[str, str], **options):
    """Load a base once with several adapters, ``{name: folder}``, the first one active.

    Returns:
        ``(model, tokenizer)``: a ``peft.PeftModel``; switch with its ``set_adapter(name)``,
        ``disable_adapter()``, ``add_weighted_adapter(...)`` and ``delete_adapter(name)``.

    Raises:
        ValueError: as above, or the adapters were trained with different tokenizers.
    """
    from tinyllm.adapter import load_adapters_on_base

    return load_adapters_on_base(base_model_path, adapters, **options)


def main(argv: list[str] | None = None) -> int:
    """Describe an adapter; with ``--output_dir`` write it merged, or in another format."""
    args = parse_args(argv)
    from tinyllm.quiet import quiet_libraries

    quiet_libraries()
    from tinyllm.adapter_folder import describe, read_adapter

    if args.lora_model:
        print(describe(read_adapter(args.lora_model)))
    if args.output_dir is None:
        return 0
    if args.base_model is None:
        raise UserError("--output_dir needs --base_model, the base to merge into")
    from tinyllm.export.command import export

    print(export(args))
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Show what an adapter is, merge or export it.")
    add = parser.add_argument
    add("--lora_model", "--lora_model_path", help="adapter folder; none exports the base alone")
    add("--base_model", "--base_model_path", help=f"base, for merging: {BASE_KINDS}")
    add_license_flag(parser)
    add("--output_dir", help="write the merged model here; without it only tell what it is")
    add("--export", default="hf", choices=["hf", "gguf", "gguf_lora", "ollama"],
        help="what to write: a Hugging Face folder, a GGUF file, the adapter alone as GGUF, or a "
        "GGUF file with Ollama's Modelfile (default: %(default)s)")  # fmt: skip
    add("--torch_dtype", choices=["float32", "bfloat16", "float16"],
        help="hf: precision of the weights (default: float32)")  # fmt: skip
    add("--save_format", choices=["safetensors", "bin"],
        help="hf: model.safetensors or pytorch_model.bin (default: the former)")  # fmt: skip
    add("--gguf_type", choices=["f32", "f16", "q8_0"],
        help="gguf, ollama: precision of the matrices (default: f16)")  # fmt: skip
    add("--force", action="store_true", help="go on with another base than the adapter's")
    add("--trust_remote_code", action="store_true", help="run code in the base folder")
    args = parser.parse_args(argv)
    if not (args.lora_model or (args.base_model and args.output_dir)):
        raise UserError("--lora_model is missing: the adapter folder")
    return args


if __name__ == "__main__":
    sys.exit(run_program(main))
