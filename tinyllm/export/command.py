"""``load_lora_model.py --output_dir``: choose the exporter, and say what was written."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinyllm.base import resolve_base
from tinyllm.errors import UserError
from tinyllm.export.source import Source

# Which of the flags means something for which format.
USED = {
    "hf": {"torch_dtype", "save_format"},
    "gguf": {"gguf_type"},
    "ollama": {"gguf_type"},
    "gguf_lora": set(),
}


def export(args: argparse.Namespace) -> str:
    """Export as the flags ask.

    Returns:
        What was written and how well it agrees, in a few lines.

    Raises:
        UserError: see the exporters; nothing was written then.
    """
    refuse_idle_flags(args)
    if args.export == "gguf_lora" and args.lora_model is None:
        raise UserError("--export gguf_lora needs --lora_model, the adapter to write")
    base = resolve_base(args.base_model, args.accept_license)
    source = Source(base, args.lora_model, args.trust_remote_code, args.force)
    target = Path(args.output_dir)
    if args.export == "hf":
        from tinyllm.export.hf import export_hf

        content = export_hf(
            source, target, args.torch_dtype or "float32", args.save_format or "safetensors"
        )
    elif args.export == "gguf_lora":
        from tinyllm.export.gguf_lora import export_gguf_lora

        return f"adapter written to {export_gguf_lora(source, target)}"
    else:
        from tinyllm.export.gguf import export_gguf

        content = export_gguf(source, target, args.gguf_type or "f16", args.export == "ollama")
    return f"merged model written to {target}\n{verdict(content)}"


def refuse_idle_flags(args: argparse.Namespace) -> None:
    """Raise a UserError for a flag that this format would ignore."""
    for name in sorted(set.union(*USED.values()) - USED[args.export]):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} means nothing with --export {args.export}")


def verdict(certificate: dict) -> str:
    """The certificate in one line."""
    reloaded = certificate["comparisons"]["reloaded"]
    return (
        f"certificate  read back in {certificate['precision']}: logits within "
        f"{reloaded['max_logit_difference']:.1e} of the adapter's (spread "
        f"{reloaded['logit_spread']:.2f}), mean KL {reloaded['mean_kl']:.1e}, same greedy choice at "
        f"{reloaded['greedy_agreement']:.1%} of {reloaded['num_positions']} positions"
    )
