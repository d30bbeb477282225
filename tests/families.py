"""Tiny random models of many families, and the chat templates that their makers' bases bring."""

from __future__ import annotations

import torch

SIZES = {
    "vocab_size": 480, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
# model_type → what differs from SIZES
FAMILIES: dict[str, dict] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "layer_types":
                    ["sliding_attention", "full_attention"]},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "attn_logit_softcapping": 2.0},
    "mistral": {"sliding_window": 8, "head_dim": 8},
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "phi3": {},
    "gpt_neox": {},
    "gpt2": {"n_inner": 64},
    "smollm3": {"no_rope_layers": [1, 0]},
    "olmo2": {},
    "granite": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 8},
    "bloom": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "falcon": {"num_key_value_heads": 4},
    "cohere": {},
    "mamba": {"state_size": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "head_dim": 8},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}  # fmt: skip


def make_family(name: str, seed: int = 0):
    """A two-layer model of a family, random, float32, as AutoModelForCausalLM makes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **(SIZES | FAMILIES[name]))
    return AutoModelForCausalLM.from_config(config).eval()


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
