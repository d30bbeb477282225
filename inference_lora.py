"""Chat with a base and a LoRA adapter.

    python inference_lora.py --base_model path/to/base --lora_model path/to/adapter --merge_weights

Type a question; quit, exit or the end of the input leaves, Ctrl-C stops a reply.
"""

from __future__ import annotations

import argparse
import sys

from tinyllm.errors import UserError, run_program


def main(argv: list[str] | None = None) -> int:
    """Load base and adapter, then chat on stdin and stdout."""
    args = parse_args(argv)
    from tinyllm.quiet import quiet_libraries

    quiet_libraries()
    from tinyllm.chat import Chat
    from tinyllm.chat_format import DEFAULT_SYSTEM_PROMPT, chat_format_of

    model, tokenizer = load(args)
    system_prompt = DEFAULT_SYSTEM_PROMPT if args.system_prompt is None else args.system_prompt
    Chat(
        model, tokenizer, chat_format_of(tokenizer), system_prompt,
        args.max_length, args.max_new_tokens, sampling_options(args),
    ).run()  # fmt: skip
    return 0


def load(args: argparse.Namespace):
    """``(model, tokenizer)`` as the flags ask: merged, beside each other, or the base alone."""
    from tinyllm.adapter import load_adapter_on_base
    from tinyllm.base import load_base, pick_device, pick_dtype

    if args.lora_model is None:
        device = pick_device(args.device)
        return load_base(
            args.base_model, pick_dtype(args.torch_dtype, device), device,
            trust_remote_code=args.trust_remote_code,
        )  # fmt: skip
    if args.merge_weights:
        from load_lora_model import load_lora_model

        return load_lora_model(
            args.base_model, args.lora_model, args.device, args.torch_dtype, args.trust_remote_code
        )
    return load_adapter_on_base(
        args.base_model, args.lora_model, args.device, args.torch_dtype,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip


def sampling_options(args: argparse.Namespace) -> dict:
    """Only what was asked for; everything else is the base's own."""
    if args.seed is not None:
        import torch

        torch.manual_seed(args.seed)
    given = {
        name: getattr(args, name)
        for name in ("temperature", "top_p", "top_k", "repetition_penalty")
        if getattr(args, name) is not None
    }
    if args.greedy:
        return given | {"do_sample": False}
    return given | ({"do_sample": True} if given.keys() & {"temperature", "top_p", "top_k"} else {})


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Chat with a base and a LoRA adapter.")
    parser.add_argument("--base_model", "--base_model_path", required=True, help="base folder")
    parser.add_argument(
        "--lora_model", "--lora_model_path", help="adapter folder; without it the base"
    )
    parser.add_argument("--merge_weights", action="store_true", help="merge the adapter (faster)")
    parser.add_argument("--system_prompt", help="system prompt (default: the training's default)")
    parser.add_argument("--max_length", type=int, default=512, help="longest prompt in tokens")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest reply in tokens")
    parser.add_argument("--temperature", type=float, help="sample with this temperature")
    parser.add_argument("--top_p", type=float, help="sample from this share of the probability")
    parser.add_argument("--top_k", type=int, help="sample from this many likeliest tokens")
    parser.add_argument("--repetition_penalty", type=float, help="over 1 discourages repeating")
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--seed", type=int, help="make sampled replies reproducible")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--torch_dtype", default="auto", help="auto, float32, bfloat16 or float16",
                        choices=["auto", "float32", "bfloat16", "float16"])  # fmt: skip
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run code in the base folder"
    )
    args = parser.parse_args(argv)
    for name in ("max_length", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be 1 or more")
    return args


if __name__ == "__main__":
    sys.exit(run_program(main))
