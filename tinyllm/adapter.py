"""Adapter folder + base → LoRA model; every file is checked before it is trusted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from tinyllm.adapter_folder import (
    BIN,
    CONFIG,
    SAFETENSORS,
    Adapter,
    read_adapter,
    read_weights,
)
from tinyllm.base import (
    TOKENIZER_FILES,
    load_base,
    load_tokenizer,
    pick_device,
    pick_dtype,
    resolve_base,
)
from tinyllm.base_record import say, verify_base
from tinyllm.errors import UserError
from tinyllm.fingerprint import hash_tokenizer
from tinyllm.lora_start import refuse_raw
from tinyllm.merge import merge
from tinyllm.vocabulary import fit_vocabulary

__all__ = [
    "BIN", "CONFIG", "SAFETENSORS", "Adapter", "attach_adapter", "load_adapter_on_base",
    "load_adapters_on_base", "merge", "read_adapter", "read_weights",
]  # fmt: skip

KEY_PREFIX = "base_model.model."
MAX_NAMES = 3


def load_adapter_on_base(
    base_model_path: str | Path,
    lora_model_path: str | Path,
    device: str = "auto",
    torch_dtype: str = "auto",
    is_trainable: bool = False,
    trust_remote_code: bool = False,
    force: bool = False,
    quantize: str | None = None,
    accept_license: bool = False,
):
    """Load a base with an adapter beside it, after checking that they belong together.

    Args:
        force: go on with another base or tokenizer than the adapter's, or an adapter without
            effect; what is wrong is said on stderr.
        quantize: ``int8`` or ``int4`` for the base's weights; the adapter stays as it is.
        accept_license: the user accepts the licence of a base that is fetched by its name.

    Returns:
        ``(PeftModel, tokenizer)``

    Raises:
        UserError: a folder is missing or damaged, or the two do not belong together.
    """
    adapter = read_adapter(lora_model_path)
    where = pick_device(device)
    dtype = pick_dtype(torch_dtype, where)
    base_model_path = resolve_base(base_model_path, accept_license)
    model, base_tokenizer = load_base(base_model_path, dtype, trust_remote_code=trust_remote_code)
    tokenizer = own_tokenizer(adapter, trust_remote_code) or base_tokenizer
    fit_vocabulary(model, tokenizer)
    check_fits(adapter, model)  # a wrong shape tells more than a wrong hash
    verify_base(adapter.path, base_model_path, base_tokenizer, tokenizer, force)
    lora = attach_adapter(model, adapter, is_trainable, force=force).to(where)
    if quantize:
        from tinyllm.quantize import quantize as quantize_weights

        quantize_weights(lora, quantize)
    return lora.train(is_trainable), tokenizer


def load_adapters_on_base(
    base_model_path: str | Path,
    adapters: Mapping[str, str | Path],
    device: str = "auto",
    torch_dtype: str = "auto",
    trust_remote_code: bool = False,
    force: bool = False,
    accept_license: bool = False,
):
    """Load a base once with several adapters beside it; the first one is active.

    Args:
        adapters: folder of each adapter by the name it is to have.

    Returns:
        ``(PeftModel, tokenizer)``; switch with peft's own ``set_adapter(name)``,
        ``disable_adapter()``, ``add_weighted_adapter(...)`` and ``delete_adapter(name)``.

    Raises:
        UserError: as :func:`load_adapter_on_base`, or the adapters' tokenizers differ.
    """
    if not adapters:
        raise UserError("load_lora_adapters: no adapters given; expected {name: folder}")
    where = pick_device(device)
    dtype = pick_dtype(torch_dtype, where)
    base_model_path = resolve_base(base_model_path, accept_license)
    model, base_tokenizer = load_base(base_model_path, dtype, trust_remote_code=trust_remote_code)
    tokenizers = {}
    for name, path in adapters.items():
        check_name(name)
        adapter = read_adapter(path)
        tokenizers[name] = own_tokenizer(adapter, trust_remote_code) or base_tokenizer
        if not isinstance(model, PeftModel):
            fit_vocabulary(model, tokenizers[name])
        verify_base(adapter.path, base_model_path, base_tokenizer, tokenizers[name], force)
        model = attach_adapter(model, adapter, name=name, force=force)
        # peft builds a combination with this dropout and leaves it switched on
        model.peft_config[name].lora_dropout = 0.0
    return model.to(where).eval(), same_tokenizer(tokenizers)


def own_tokenizer(adapter: Adapter, trust_remote_code: bool = False):
    """The tokenizer that an adapter folder brings, None if it brings none."""
    if not any((adapter.path / name).is_file() for name in TOKENIZER_FILES[:2]):
        return None
    try:
        return load_tokenizer(adapter.path, trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"{adapter.path}: its tokenizer cannot be loaded: {error}") from error


def same_tokenizer(tokenizers: dict):
    """The one tokenizer of several adapters; raises a UserError where they differ."""
    (first, chosen), *others = tokenizers.items()
    for name, tokenizer in others:
        if hash_tokenizer(tokenizer) != hash_tokenizer(chosen):
            raise UserError(f"the adapters {first} and {name} were trained with other tokenizers")
        if tokenizer.chat_template != chosen.chat_template:
            raise UserError(f"the adapters {first} and {name} were trained with other templates")
    return chosen


def check_name(name: str) -> None:
    """Raise a UserError for a name that peft cannot use: it becomes the name of a module."""
    if not name.isidentifier() or "lora_" in name or hasattr(nn.ModuleDict, name):
        raise UserError(
            f"adapter name {name!r}: use letters, digits and underscores, not 'lora_', and no name "
            "that torch's modules use, such as half or train"
        )


def attach_adapter(
    model, adapter: Adapter, is_trainable: bool = False, name: str = "default", force: bool = False
) -> PeftModel:
    """Put an adapter on a base (or beside the adapters it has already), as a PeftModel.

    Raises:
        UserError: the adapter does not fit the base, lacks tensors that its config promises, has
            others that would be ignored, holds NaN, or has no effect (unless forced).
    """
    refuse_raw(adapter.config, adapter.path)
    check_content(adapter, force)
    is_first = not isinstance(model, PeftModel)
    base = model if is_first else model.get_base_model()
    check_fits(adapter, base)
    names_of_base = {KEY_PREFIX + n for n in base.state_dict()}
    try:
        if is_first:
            model = PeftModel.from_pretrained(
                model, str(adapter.path), adapter_name=name, is_trainable=is_trainable
            )
        else:
            model.load_adapter(str(adapter.path), adapter_name=name, is_trainable=is_trainable)
    except KeyError as error:
        raise UserError(f"{adapter.path}: the tensor {error} is missing") from error
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{adapter.path}: peft cannot load it: {reason}") from error
    check_complete(adapter, model, name, names_of_base, force)
    return model


def check_content(adapter: Adapter, force: bool = False) -> None:
    """Raise a UserError for tensors that cannot be what a training has left."""
    if adapter.broken:
        raise UserError(
            f"{adapter.path}: {len(adapter.broken)} tensors hold NaN or infinity, "
            f"first {adapter.broken[0]}; the training went wrong, take an earlier checkpoint"
        )
    if not adapter.has_effect:
        problem = (
            f"{adapter.path}: the adapter changes nothing, all {len(adapter.zero_products)} "
            f"matrices that start at zero still are, as {_some(adapter.zero_products)}"
        )
        _stop_unless(force, f"{problem}; was it saved before the first step?")


def check_complete(
    adapter: Adapter, model, name: str, names_of_base: set[str], force: bool = False
) -> None:
    """Raise a UserError for tensors that the adapter lacks, or that peft has ignored."""
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    missing = sorted(state.keys() - adapter.weights.keys())
    if missing:
        raise UserError(
            f"{adapter.path}: {len(missing)} of {len(state)} tensors are missing, "
            f"first {_some(missing)}"
        )
    # an adapter may carry layers of its base along (embeddings that were resized)
    known = state.keys() | names_of_base | {_in_wrapper(n) for n in names_of_base}
    ignored = sorted(adapter.weights.keys() - known)
    if ignored:
        problem = f"{adapter.path}: {len(ignored)} tensors belong to nothing in its configuration"
        _stop_unless(force, f"{problem} and would be ignored: {_some(ignored)}")


def _in_wrapper(name: str) -> str:
    layer, _, part = name.rpartition(".")
    return f"{layer}.base_layer.{part}"


def _stop_unless(force: bool, problem: str) -> None:
    if not force:
        raise UserError(f"{problem}; force=True (--force) to load it all the same")
    say(f"warning: {problem}; going on, as forced")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def check_fits(adapter: Adapter, model) -> None:
    """Raise a UserError when the adapter was made for a base of another shape."""
    modules = {n.replace(".base_layer", ""): m for n, m in model.named_modules()}
    for name, tensor in adapter.weights.items():
        layer, _, part = name.removeprefix(KEY_PREFIX).partition(".lora_")
        if part not in ("A.weight", "B.weight"):
            continue
        sizes = sizes_of(modules.get(layer))
        if sizes is None:
            raise UserError(
                f"{adapter.path}: made for another base: it adapts {layer}, which this base has not"
            )
        is_a = part == "A.weight"
        size, side = (sizes[0], "inputs") if is_a else (sizes[1], "outputs")
        got = tensor.shape[1] if is_a else tensor.shape[0]
        if got != size:
            raise UserError(
                f"{adapter.path}: made for another base: its {layer} has {got} {side}, "
                f"this base's {size}"
            )


def sizes_of(module) -> tuple[int, int] | None:
    """``(inputs, outputs)`` of a linear layer, or of GPT-2's Conv1D; None for anything else."""
    for inputs, outputs in (("in_features", "out_features"), ("nx", "nf")):
        if hasattr(module, inputs) and hasattr(module, outputs):
            return getattr(module, inputs), getattr(module, outputs)
    return None
