"""What a base *is*: a hash of its weights, tokenizer and chat template.

Two folders with the same tensors have the same fingerprint, whatever the file format, and however
the weights are later held in memory.  Of a large tensor an evenly spaced sample is hashed, so that
a base of many gigabytes takes seconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

SAMPLES_PER_TENSOR = 4096


def fingerprint(base: str | Path, tokenizer) -> dict[str, str]:
    """Hashes of a base folder: ``weights``, ``tokenizer`` and ``chat_template``."""
    return {
        "weights": hash_weights(Path(base)),
        "tokenizer": hash_tokenizer(tokenizer),
        "chat_template": _sha256((tokenizer.chat_template or "").encode()),
    }


def hash_weights(folder: Path) -> str:
    """Hash names, shapes and sampled values of every tensor in a folder, in float32."""
    tensors = {name: _digest_tensor(tensor) for name, tensor in _tensors(folder)}
    return _sha256(json.dumps(tensors, sort_keys=True).encode())


def hash_tokenizer(tokenizer) -> str:
    """Hash the vocabulary and the ids of a few telling strings."""
    probes = ["你好，世界！ 123 abc\n", "  <|user|>\nA\tb", "😀龘"]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in probes]
    vocabulary = sorted(tokenizer.get_vocab().items())
    return _sha256(json.dumps([vocabulary, ids], ensure_ascii=True).encode())


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    files = sorted(folder.glob("model*.safetensors"))
    for path in files:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield name, opened.get_tensor(name)
    if not files:
        for path in sorted(folder.glob("pytorch_model*.bin")):
            yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()


def _digest_tensor(tensor: torch.Tensor) -> str:
    flat = tensor.detach().flatten()
    step = max(1, len(flat) // SAMPLES_PER_TENSOR)
    sample = flat[::step].to(torch.float32).numpy()
    return f"{list(tensor.shape)} {_sha256(sample.tobytes())}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
