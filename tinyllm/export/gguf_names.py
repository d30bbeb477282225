"""How the models we export are laid out in a GGUF file: architectures, tensor names, head order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tinyllm.errors import UserError
from tinyllm.export.gguf_gemma3 import check_gemma3

if TYPE_CHECKING:
    import torch

REQUIREMENTS = "requirement-gguf.txt"
GGUF_PLACES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
# Gemma 3 has a norm before and one after each half of a layer.
GEMMA3_PLACES = GGUF_PLACES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GGUF_TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


@dataclass(frozen=True)
class Architecture:
    """How one model type is laid out.

    Attributes:
        name: its name in a GGUF file.
        interleaved: whether its query and key rows are stored in pairs (x0, x_half, x1, ...), as
            llama.cpp rotates them, instead of in halves, as transformers does.
        norm_offset: what is added to the weights of its norms; Gemma's count from 0, the file's from 1.
        places: its names of a layer's tensors in transformers -> in the file.
    """

    name: str
    interleaved: bool = False
    norm_offset: float = 0.0
    places: dict[str, str] = field(default_factory=lambda: GGUF_PLACES)


ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma3_text": Architecture("gemma3", norm_offset=1.0, places=GEMMA3_PLACES),
}


def gguf_package():
    """The ``gguf`` package; a UserError that says how to get it."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            f"writing GGUF needs one more package: pip install -r {REQUIREMENTS}"
        ) from error
    return gguf


def architecture_of(config) -> Architecture:
    """The layout of a model; a UserError for one that cannot be written."""
    known = ARCHITECTURES.get(config.model_type)
    if known is None:
        raise UserError(
            f"GGUF: models of type {config.model_type} cannot be written, only "
            f"{', '.join(ARCHITECTURES)}; export a Hugging Face folder (--export hf) and use the "
            "converter of llama.cpp"
        )
    kinds = {rope.get("rope_type", "default") for rope in ropes_of(config)} - {"default"}
    if kinds or getattr(config, "rope_scaling", None) not in (None, config.rope_parameters):
        names = ", ".join(sorted(kinds)) or "of its own"
        raise UserError(f"GGUF: position scaling {names} cannot be written here")
    if known.name == "gemma3":
        check_gemma3(config)
    if getattr(config, "use_sliding_window", False):
        raise UserError("GGUF: a model with sliding-window attention cannot be written here")
    return known


def ropes_of(config) -> list[dict]:
    """The rotations of a model, that of its full attention first; Gemma 3 has two."""
    rope = dict(config.rope_parameters or {})
    if "full_attention" in rope:
        return [rope["full_attention"], *(v for k, v in rope.items() if k != "full_attention")]
    return [rope]


def gguf_name(name: str, architecture: Architecture) -> str | None:
    """Name of a transformers tensor in a GGUF file, None for one that has no place there."""
    layer, _, part = name.rpartition(".")
    if layer in GGUF_TOP:
        return f"{GGUF_TOP[layer]}.{part}"
    words = layer.split(".")
    if words[:2] != ["model", "layers"] or not words[2:3] or not words[2].isdigit():
        return None
    place = architecture.places.get(".".join(words[3:]))
    return f"blk.{words[2]}.{place}.{part}" if place else None


def reorder_heads(name: str, rows: torch.Tensor, config, architecture: Architecture):
    """Rows (outputs) of a query or key projection in the order in which llama.cpp rotates them.

    ``rows``: ``(heads x head_dim, ...)``; other tensors are returned as they are.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((n for part, n in heads.items() if part in name), None)
    if not architecture.interleaved or count is None:
        return rows
    half = rows.shape[0] // count // 2
    return rows.reshape(count, 2, half, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
