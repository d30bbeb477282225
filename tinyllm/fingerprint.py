"""What a base *is*: a hash of its weights, tokenizer and chat template.

Two folders with the same tensors have the same fingerprint, whatever the file format, and however
the weights are later held in memory.  Of a large tensor an evenly spaced sample is hashed, so that
a base of many gigabytes takes seconds.  A base that was trained further, pruned, merged or
quantised differs in nearly every element, so the sample tells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from tinyllm.errors import UserError

SAMPLES_PER_TENSOR = 4096
PARTS = {"weights": "weights", "tokenizer": "tokenizer", "chat_template": "chat template"}


def fingerprint(base: str | Path, tokenizer) -> dict[str, str]:
    """Hashes of a base (a folder, or a GGUF file): ``weights``, ``tokenizer``, ``chat_template``.

    Raises:
        UserError: there are no weights to hash.
    """
    return {"weights": hash_weights(Path(base)), **hash_text_side(tokenizer)}


def hash_text_side(tokenizer) -> dict[str, str]:
    """Hashes of what turns a conversation into ids: ``tokenizer`` and ``chat_template``."""
    return {
        "tokenizer": hash_tokenizer(tokenizer),
        "chat_template": _sha256((tokenizer.chat_template or "").encode()),
    }


def hash_weights(folder: Path) -> str:
    """Hash names, shapes and sampled values of every tensor in a folder, in float32."""
    tensors = {name: _digest_tensor(tensor) for name, tensor in _tensors(folder)}
    if not tensors:
        raise UserError(f"{folder}: no weights to take a fingerprint of")
    # a .bin repeats a tied output layer, a .safetensors leaves it out
    if tensors.get("lm_head.weight") == tensors.get("model.embed_tokens.weight"):
        tensors.pop("lm_head.weight", None)
    return _sha256(json.dumps(tensors, sort_keys=True).encode())


def hash_tokenizer(tokenizer) -> str:
    """Hash the vocabulary and the ids of a few telling strings."""
    probes = ["你好，世界！ 123 abc\n", "  <|user|>\nA\tb", "😀龘"]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in probes]
    vocabulary = sorted(tokenizer.get_vocab().items())
    return _sha256(json.dumps([vocabulary, ids], ensure_ascii=True).encode())


def differing_parts(recorded: dict[str, str], found: dict[str, str]) -> list[str]:
    """What differs between two fingerprints, in words with the first digits of both hashes."""
    return [
        f"{words} ({recorded[part][:12]} when it was trained, {found[part][:12]} here)"
        for part, words in PARTS.items()
        if part in recorded and part in found and recorded[part] != found[part]
    ]


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    safetensors = sorted(folder.glob("model*.safetensors"))
    bins = sorted(folder.glob("pytorch_model*.bin"))
    for path in safetensors:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield name, opened.get_tensor(name)
    if safetensors:
        return
    for path in bins:
        yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()
    if not bins:
        files = [folder] if folder.is_file() else sorted(folder.glob("*.gguf"))
        for number, path in enumerate(files):
            yield f"file {number}", torch.from_numpy(np.fromfile(path, dtype=np.uint8))


def _digest_tensor(tensor: torch.Tensor) -> str:
    flat = tensor.detach().flatten()
    # odd, so that the samples wander over the columns of a matrix whose width is even
    step = max(1, len(flat) // SAMPLES_PER_TENSOR) | 1
    sample = flat[::step].to(torch.float32).numpy()
    return f"{list(tensor.shape)} {_sha256(sample.tobytes())}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
