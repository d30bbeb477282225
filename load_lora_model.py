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
from pathlib import Path

from tinyllm.errors import UserError, run_program


def load_lora_model(
    base_model_path: str,
    lora_model_path: str,
    device: str = "auto",
    torch_dtype: str = "auto",
    trust_remote_code: bool = False,
):
    """Load a base, merge an adapter into it, and return both ready for inference.

    Args:
        base_model_path: folder of the base that the adapter was trained on.
        lora_model_path: adapter folder, with ``.safetensors`` or ``.bin`` weights.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, ...
        torch_dtype: ``auto`` (bfloat16 on a GPU that has it, else float32) or a dtype's name.
        trust_remote_code: run Python code that lies in the base's folder.

    Returns:
        ``(model, tokenizer)``: a plain transformers model with the adapter in its weights.

    Raises:
        ValueError: a folder is missing, damaged, or the two do not belong together.
    """
    from tinyllm.adapter import load_adapter_on_base, merge
    from tinyllm.base import pick_device, pick_dtype

    lora, tokenizer = load_adapter_on_base(
        base_model_path, lora_model_path, device, "float32", trust_remote_code=trust_remote_code
    )
    return merge(lora, pick_dtype(torch_dtype, pick_device(device))), tokenizer


def load_lora_model_without_merge(
    base_model_path: str,
    lora_model_path: str,
    device: str = "auto",
    torch_dtype: str = "auto",
    is_trainable: bool = False,
    trust_remote_code: bool = False,
):
    """Load a base with an adapter beside it.

    Args:
        is_trainable: True to train the adapter further; the others as in :func:`load_lora_model`.

    Returns:
        ``(model, tokenizer)``: a ``peft.PeftModel``.

    Raises:
        ValueError: a folder is missing, damaged, or the two do not belong together.
    """
    from tinyllm.adapter import load_adapter_on_base

    return load_adapter_on_base(
        base_model_path, lora_model_path, device, torch_dtype, is_trainable, trust_remote_code
    )


def main(argv: list[str] | None = None) -> int:
    """Describe an adapter; with ``--output_dir`` merge it."""
    args = parse_args(argv)
    from tinyllm.quiet import quiet_libraries

    quiet_libraries()
    from tinyllm.adapter import read_adapter

    adapter = read_adapter(args.lora_model)
    print(describe(adapter))
    if args.output_dir is None:
        return 0
    if args.base_model is None:
        raise UserError("--output_dir needs --base_model, the base to merge into")
    target = Path(args.output_dir)
    if target.exists() and any(target.iterdir()):
        raise UserError(f"--output_dir {target}: the folder is not empty; choose another")
    from tinyllm.export import save_merged

    model, tokenizer = load_lora_model(args.base_model, args.lora_model, "cpu", args.torch_dtype)
    save_merged(model, tokenizer, target)
    print(f"merged model written to {target}")
    return 0


def describe(adapter) -> str:
    """What an adapter is, in a few lines."""
    config = adapter.config
    targets = config.get("target_modules")
    targets = targets if isinstance(targets, str) else ", ".join(sorted(targets or []))
    effect = "" if adapter.has_effect else "\nwarning      every B matrix is zero: no effect at all"
    return (
        f"adapter      {adapter.path} ({adapter.weights_file})\n"
        f"trained on   {config.get('base_model_name_or_path')}\n"
        f"kind         {config.get('peft_type')}, r {config.get('r')}, "
        f"alpha {config.get('lora_alpha')}, dropout {config.get('lora_dropout')}\n"
        f"adapts       {targets}\n"
        f"parameters   {adapter.num_parameters:,} in {len(adapter.weights)} tensors{effect}"
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Show what an adapter is, or merge it into a folder."
    )
    parser.add_argument("--lora_model", "--lora_model_path", required=True, help="adapter folder")
    parser.add_argument("--base_model", "--base_model_path", help="base folder, for merging")
    parser.add_argument("--output_dir", help="write the merged model here")
    parser.add_argument(
        "--torch_dtype", default="float32", choices=["float32", "bfloat16", "float16"],
        help="precision of the merged weights (default: %(default)s)",
    )  # fmt: skip
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_program(main))
