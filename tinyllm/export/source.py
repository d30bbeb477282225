"""What an export starts from: base and adapter, merged in float32, with the adapter's own logits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from tinyllm.adapter import load_adapter_on_base
from tinyllm.adapter_folder import read_adapter
from tinyllm.base import load_base, resolve_base
from tinyllm.base_record import read_record
from tinyllm.certificate import Comparison, certify, logits_of, probe_ids
from tinyllm.errors import UserError
from tinyllm.fingerprint import fingerprint
from tinyllm.merge import merge, refuse_quantised


@dataclass(frozen=True)
class Source:
    """What is to be exported.

    Attributes:
        base: folder of the base.
        adapter: folder of the adapter; None exports the base as it is.
        force: go on where the two do not belong together.
    """

    base: str
    adapter: str | None
    trust_remote_code: bool = False
    force: bool = False


@dataclass
class Merged:
    """A merged model in float32, and what the adapter beside its base said.

    Attributes:
        probes: token ids, each ``(1, T)``.
        reference: the adapter's logits on them, ``(N, V)`` float32.
        comparison: how far the merged model's logits lie from the reference.
        facts: hashes and versions for the certificate.
    """

    model: torch.nn.Module
    tokenizer: object
    probes: list[torch.Tensor]
    reference: torch.Tensor
    comparison: Comparison
    facts: dict


def merge_source(source: Source) -> Merged:
    """Load, note the adapter's logits, merge in float32, compare.

    Raises:
        UserError: the two do not belong together, cannot be merged, or the merged model differs.
    """
    more = {"trust_remote_code": source.trust_remote_code}
    if source.adapter is None:
        model, tokenizer = load_base(source.base, torch.float32, "cpu", **more)
        refuse_quantised(model)
    else:
        model, tokenizer = load_adapter_on_base(
            source.base, source.adapter, "cpu", "float32", force=source.force, **more
        )
    probes = probe_ids(model, tokenizer)
    reference = logits_of(model, probes)
    if source.adapter is not None:
        model = merge(model, torch.float32)
    comparison = certify(reference, model, probes, "merged", "float32")
    return Merged(model, tokenizer, probes, reference, comparison, facts_of(source, tokenizer))


def facts_of(source: Source, tokenizer) -> dict:
    """What went into an export: hashes of base and adapter, and versions."""
    facts = {
        "base_model": str(source.base),
        "base": fingerprint(resolve_base(source.base), tokenizer),
        "adapter": None,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    if source.adapter is None:
        return facts
    adapter = read_adapter(source.adapter)
    record = read_record(adapter.path)
    content = (adapter.path / adapter.weights_file).read_bytes()
    return facts | {
        "adapter": str(source.adapter),
        "adapter_sha256": hashlib.sha256(content).hexdigest(),
        "system_prompt": record["system_prompt"] if record else None,
        "base_is_the_recorded_one": None
        if record is None
        else record["base"]["weights"] == facts["base"]["weights"],
    }


def check_target(target: Path) -> None:
    """Raise a UserError when a folder to write is in use."""
    if target.is_file():
        raise UserError(f"--output_dir {target}: a file of that name is in the way")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"--output_dir {target}: the folder is not empty; choose another")
