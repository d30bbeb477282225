"""What a Gemma 3 text model says in a GGUF file beyond the others, and what must hold for it.

llama.cpp applies the scale of the embeddings and the gate's tanh-GELU by itself and takes several
numbers for granted, and transformers, which reads each file back, takes more of them.  A model with
other numbers would load without an error and answer otherwise, so it is refused here.
"""

from __future__ import annotations

from tinyllm.errors import UserError

# Not in the file: what both readers assume of every Gemma 3 (the 27B one, whose heads have 128
# values and another scale, is the exception that llama.cpp knows by its number of layers).
HEAD_DIM = 256
FULL_EVERY = 6
LOCAL_ROPE_THETA = 10000.0


def check_gemma3(config) -> None:
    """Raise a UserError for a Gemma 3 that a reader of its GGUF file would take for another."""
    sliding = dict(config.rope_parameters["sliding_attention"])
    wrong = [
        f"{name} {found} (only {expected})"
        for name, found, expected in (
            ("head_dim", config.head_dim, HEAD_DIM),
            ("query_pre_attn_scalar", config.query_pre_attn_scalar, HEAD_DIM),
            ("hidden_activation", config.hidden_activation, "gelu_pytorch_tanh"),
            ("attention_bias", bool(config.attention_bias), False),
            ("final_logit_softcapping", config.final_logit_softcapping, None),
            ("attn_logit_softcapping", config.attn_logit_softcapping, None),
            ("use_bidirectional_attention", bool(config.use_bidirectional_attention), False),
            ("rope_theta of local layers", sliding["rope_theta"], LOCAL_ROPE_THETA),
            ("full attention in layers", full_layers(config.layer_types), usual_layers(config)),
        )
        if found != expected
    ]
    if wrong:
        raise UserError(
            f"GGUF: this Gemma 3 cannot be written: {', '.join(wrong)}; export a Hugging Face folder "
            "(--export hf)"
        )


def full_layers(layer_types: list[str]) -> list[int]:
    """Indices of the layers that attend to everything; the others slide."""
    return [index for index, kind in enumerate(layer_types) if kind == "full_attention"]


def usual_layers(config) -> list[int]:
    """Where every Gemma 3 has its full attention: each sixth layer."""
    return [i for i in range(config.num_hidden_layers) if i % FULL_EVERY == FULL_EVERY - 1]


def add_gemma3(writer, config) -> None:
    """Write what only Gemma 3 has: its window, where it slides, and the local layers' rotation."""
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern(FULL_EVERY)
    writer.add_rope_freq_base_swa(LOCAL_ROPE_THETA)
