"""Folders of the tiny-llm-zh family for tests, and its model written out in plain torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch.nn.functional import silu, softmax

FIXTURES = Path(__file__).resolve().parent / "fixtures" / "tiny_llm_zh"
ORACLE = json.loads((FIXTURES / "tokenizer" / "oracle.json").read_text(encoding="utf-8"))
TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
CODE_FILES = ("configuration_tinyllm.py", "modeling_tinyllm.py", "tokenization_chatglm.py")


def family_folder(
    target: Path, source: str = "small/bin", tokenizer: bool = True, **config
) -> Path:
    """Copy a model folder, with the tokenizer's files, and change its ``config.json``."""
    shutil.copytree(FIXTURES / source, target)
    for name in TOKENIZER_FILES if tokenizer else ():
        shutil.copy(FIXTURES / "tokenizer" / name, target)
    content = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(
        json.dumps({k: v for k, v in content.items() if v != "gone"})
    )
    return target


def add_code(folder: Path) -> Path:
    """Add the ``auto_map`` and the code files of a later save; running one ends the program."""
    for name in CODE_FILES:
        (folder / name).write_text("raise SystemExit('executed')\n")
    auto_map = {
        "AutoConfig": "configuration_tinyllm.TinyllmConfig",
        "AutoModelForCausalLM": "modeling_tinyllm.TinyllmForCausalLM",
    }
    content = json.loads((folder / "config.json").read_text()) | {"auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def random_folder(
    target: Path, tie: bool = False, dtype=torch.float32, **shape
) -> tuple[dict, dict]:
    """Write a raw folder with random weights; returns its configuration and its tensors."""
    config = {
        "architectures": ["TinyllmForCausalLM"], "model_type": "tinyllm", "vocab_size": 300,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "tie_word_embeddings": tie, "torch_dtype": str(dtype)[6:], **shape,
    }  # fmt: skip
    size, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    keys = size * config.get("num_key_value_heads", heads) // heads
    layer = {
        "self_attn.q_proj.weight": (size, size), "self_attn.q_proj.bias": (size,),
        "self_attn.k_proj.weight": (keys, size), "self_attn.k_proj.bias": (keys,),
        "self_attn.v_proj.weight": (keys, size), "self_attn.v_proj.bias": (keys,),
        "self_attn.o_proj.weight": (size, size), "mlp.gate_proj.weight": (inner, size),
        "mlp.up_proj.weight": (inner, size), "mlp.down_proj.weight": (size, inner),
        "input_layernorm.weight": (size,), "post_attention_layernorm.weight": (size,),
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (300, size), "model.norm.weight": (size,)}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s, generator=generator).mul(0.3).to(dtype) for n, s in shapes.items()}
    head = torch.randn((300, size), generator=generator).to(dtype)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] if tie else head
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    torch.save(weights, target / "pytorch_model.bin")
    return config, weights


def forward(config: dict, weights: dict, ids: torch.Tensor) -> torch.Tensor:
    """Logits ``(T, vocabulary)`` of one row of ids ``(T,)``, in float32."""
    w = {name: tensor.float() for name, tensor in weights.items()}
    heads, size = config["num_attention_heads"], config["hidden_size"]
    kv_heads, width, length = config.get("num_key_value_heads", heads), size // heads, len(ids)
    frequencies = config["rope_theta"] ** (-torch.arange(0, width, 2).float() / width)
    angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)
    future = torch.ones(length, length).triu(1).bool()

    def norm(x, name):
        return (
            x
            * (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt()
            * w[f"{name}.weight"]
        )

    def rotate(x):  # (heads, T, width)
        left, right = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-right, left], -1) * angles.sin()

    def split(x, name, number):
        x = x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        return x.view(length, number, width).transpose(0, 1).repeat_interleave(heads // number, 0)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        inside = norm(x, f"{at}.input_layernorm")
        q = rotate(split(inside, f"{at}.self_attn.q_proj", heads))
        k = rotate(split(inside, f"{at}.self_attn.k_proj", kv_heads))
        v = split(inside, f"{at}.self_attn.v_proj", kv_heads)
        scores = (q @ k.transpose(1, 2) / width**0.5).masked_fill(future, float("-inf"))
        mixed = (softmax(scores, -1) @ v).transpose(0, 1).reshape(length, size)
        x = x + mixed @ w[f"{at}.self_attn.o_proj.weight"].T
        inside = norm(x, f"{at}.post_attention_layernorm")
        gate = silu(inside @ w[f"{at}.mlp.gate_proj.weight"].T)
        x = (
            x
            + (gate * (inside @ w[f"{at}.mlp.up_proj.weight"].T))
            @ w[f"{at}.mlp.down_proj.weight"].T
        )
    return norm(x, "model.norm") @ w["lm_head.weight"].T
