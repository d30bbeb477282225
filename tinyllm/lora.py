"""Base model → LoRA model, through peft: a fresh adapter, or one that is trained further."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from tinyllm.errors import UserError
from tinyllm.fast_lora import use_fast_lora
from tinyllm.lora_settings import parse_pattern
from tinyllm.lora_start import refuse_raw, remember_start
from tinyllm.settings import LoraSettings
from tinyllm.sharded import num_elements
from tinyllm.vocabulary import embedding_rows, is_tied

ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding)


def add_lora(model, settings: LoraSettings):
    """Wrap a base in an adapter; only the adapter is trainable, in float32.

    Raises:
        UserError: a setting names a layer or a token that this base has not, or the adapter of
            ``adapter_path`` does not fit.
    """
    was_tied = is_tied(model)
    if settings.adapter_path:
        lora = continue_adapter(model, settings)
    else:
        lora = fresh_adapter(model, settings)
    for parameter in lora.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    if was_tied:
        check_still_tied(lora)
    keep_precision(lora)
    return lora


def fresh_adapter(model, settings: LoraSettings) -> PeftModel:
    """A new adapter around a base; raises as :func:`add_lora`."""
    check_targets(model, settings.lora_target_modules)
    check_layers(model, "modules_to_save", settings.modules_to_save)
    check_tokens(model, settings.trainable_token_indices)
    check_start_fits(model, settings)
    config = lora_config(model, settings)
    if settings.fast_lora and not getattr(model, "is_quantized", False):
        use_fast_lora(config)
    try:
        lora = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"peft refuses this adapter for this base: {reason}") from error
    check_patterns(lora, settings)
    if settings.moves_base_weights:
        remember_start(lora)
    return lora


def lora_config(model, settings: LoraSettings) -> LoraConfig:
    """The settings as peft's configuration."""
    targets, start = settings.lora_target_modules, settings.init_lora_weights
    tokens = settings.trainable_token_indices
    embeddings = {*settings.modules_to_save, *targets} & set(embedding_names(model))
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights={"true": True, "false": False}.get(start, start),
        rank_pattern=parse_pattern("rank_pattern", settings.rank_pattern),
        alpha_pattern=parse_pattern("alpha_pattern", settings.alpha_pattern),
        modules_to_save=settings.modules_to_save or None,
        trainable_token_indices=token_rows(model, tokens) if tokens else None,
        ensure_weight_tying=is_tied(model) and bool(embeddings or tokens),
    )


def continue_adapter(model, settings: LoraSettings) -> PeftModel:
    """The adapter of ``adapter_path``, trainable; raises as :func:`add_lora`."""
    from tinyllm.adapter import check_fits, read_adapter

    adapter = read_adapter(settings.adapter_path)
    check_fits(adapter, model)
    refuse_raw(adapter.config, adapter.path)
    path = str(Path(settings.adapter_path))
    try:
        config = LoraConfig.from_pretrained(path)
        config.lora_dropout = settings.lora_dropout
        config.inference_mode = False
        if settings.fast_lora and not getattr(model, "is_quantized", False):
            use_fast_lora(config)
        return PeftModel.from_pretrained(model, path, is_trainable=True, config=config)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--adapter_path {path}: peft cannot go on with it: {reason}") from error


def describe_adapter(lora: PeftModel, path: str) -> str:
    """What an adapter that is trained further brings, in place of the settings of a fresh one."""
    config = lora.peft_config["default"]
    return (
        f"going on with the adapter {path}: r {config.r}, alpha {config.lora_alpha}, layers "
        f"{', '.join(sorted(config.target_modules))}; --lora_r, --lora_alpha and "
        "--lora_target_modules have no effect"
    )


def check_targets(model, targets: list[str]) -> None:
    """Raise a UserError when a target names no layer that can be adapted, listing those it has."""
    if targets != ["all-linear"]:
        check_layers(model, "lora_target_modules", targets, ADAPTABLE)


def check_layers(model, setting: str, wanted: list[str], kinds=(nn.Module,)) -> None:
    """Raise a UserError when a name belongs to no layer of the base, listing those it has."""
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    missing = [t for t in wanted if not any(name == t or name.endswith(f".{t}") for name in names)]
    if missing:
        leaves = {
            n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, ADAPTABLE)
        }
        hide = set(embedding_names(model)) if setting == "lora_target_modules" else set()
        known = ", ".join(sorted(leaves - hide))
        anyway = "; all-linear takes all of them" if setting == "lora_target_modules" else ""
        raise UserError(
            f"--{setting}: no layer of this base is called {', '.join(missing)}; "
            f"it has {known}{anyway}"
        )


def check_tokens(model, ids: list[int]) -> None:
    """Raise a UserError when a token id lies outside the base's vocabulary."""
    rows = embedding_rows(model)
    outside = [index for index in ids if index >= rows]
    if outside:
        raise UserError(
            f"--trainable_token_indices {outside[0]}: this base has ids 0 to {rows - 1}"
        )


def check_start_fits(model, settings: LoraSettings) -> None:
    """Raise a UserError for OLoRA on GPT-2's layers, whose weights peft would take the wrong way."""
    if settings.init_lora_weights == "olora" and any(
        isinstance(m, Conv1D) for m in model.modules()
    ):
        raise UserError(
            "--init_lora_weights olora: peft cannot start this base's layers (Conv1D) that way; "
            "use pissa"
        )


def check_still_tied(lora: PeftModel) -> None:
    """Raise a UserError when training would tear a base's tied embeddings apart.

    peft ties what it trains of them for most bases, not for all.
    """
    from peft.utils import ModulesToSaveWrapper

    base = lora.get_base_model()
    ends = []
    for end in (base.get_input_embeddings(), base.get_output_embeddings()):
        trained = isinstance(end, ModulesToSaveWrapper)
        ends.append(next(iter(end.modules_to_save.values())) if trained else end)
    if any(isinstance(end, (nn.Embedding, nn.Linear)) for end in ends) and (
        ends[0].weight is not ends[1].weight
    ):
        raise UserError(
            "--modules_to_save: this base's input and output embeddings are one matrix, and peft "
            "cannot train them as one here; leave them out, or use --trainable_token_indices"
        )


def check_patterns(lora: PeftModel, settings: LoraSettings) -> None:
    """Raise a UserError for a pattern that matches no adapted layer, which peft would ignore."""
    adapted = [name for name, module in lora.named_modules() if hasattr(module, "lora_A")]
    for setting in ("rank_pattern", "alpha_pattern"):
        for key in parse_pattern(setting, getattr(settings, setting)):
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in adapted):
                raise UserError(f"--{setting}: {key} matches none of the adapted layers")


def embedding_names(model) -> list[str]:
    """Last names of the base's input embedding and output head: ``["embed_tokens", "lm_head"]``."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if any(module is end for end in ends)
    ]


def token_rows(model, ids: list[int]) -> list[int] | dict[str, list[int]]:
    """What peft trains of single tokens: the input rows, and the head's own where it is not tied."""
    if is_tied(model):
        return ids
    return dict.fromkeys(embedding_names(model), ids)


def keep_precision(lora: PeftModel) -> None:
    """Let layers that are trained in full, in float32, stand within a base of another precision."""
    from peft.utils import ModulesToSaveWrapper

    for module in lora.modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        outside = next(module.original_module.parameters()).dtype
        for trained in module.modules_to_save.values():
            inside = next(trained.parameters()).dtype
            if inside != outside:
                trained.register_forward_pre_hook(lambda _, args, d=inside: _cast(args, d))
                trained.register_forward_hook(lambda _, args, out, d=outside: out.to(d))


def _cast(args: tuple, dtype: torch.dtype) -> tuple:
    return tuple(a.to(dtype) if torch.is_tensor(a) and a.is_floating_point() else a for a in args)


def without_idle_adapter(model) -> AbstractContextManager:
    """For as long as the block lasts, a LoRA whose B is zero (so that it adds nothing) is not computed."""
    if not isinstance(model, PeftModel):
        return nullcontext()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    idle = all(
        ".lora_A." in name or (".lora_B." in name and not p.any()) for name, p in trained.items()
    )
    return model.disable_adapter() if trained and idle else nullcontext()


def count_parameters(model) -> tuple[int, int]:
    """``(trainable, total)`` parameters of a model."""
    sizes = [(num_elements(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)
