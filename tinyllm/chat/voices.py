"""Who can answer: the base, and each of its adapters, all loaded once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from tinyllm.adapter import (
    CONFIG,
    Adapter,
    attach_adapter,
    check_fits,
    load_adapter_on_base,
    merge,
    read_adapter,
)
from tinyllm.base import load_base, pick_device, pick_dtype, read_json
from tinyllm.chat.options import adapters_of
from tinyllm.decode.pick import EngineMaker
from tinyllm.errors import UserError

FIRST = "default"  # peft's name for the first adapter


class Voices:
    """A base, its adapters by name, and an engine for each.

    Attributes:
        current: name of the adapter that answers; None for the base.
        merged: the adapter's name where it is merged into the weights, so that no base is left.
    """

    def __init__(
        self, model, tokenizer, maker: EngineMaker, adapters: dict[str, str | None]
    ) -> None:
        """Keep what is loaded; ``adapters`` maps our names to peft's, None where merged."""
        self.model, self.tokenizer, self.maker, self.adapters = model, tokenizer, maker, adapters
        self.current = next(iter(adapters), None)
        self.merged = next((name for name, inner in adapters.items() if inner is None), None)
        self._engines: dict = {}

    @property
    def names(self) -> list[str]:
        return list(self.adapters)

    def engine(self, name: str | None):
        """What writes as this adapter, or as the base for None.

        Raises:
            UserError: the base is asked for and the adapter is merged into it.
        """
        if name is None and self.merged:
            raise UserError("the adapter is merged into the base; leave out --merge_weights")
        if name not in self._engines:
            self._engines[name] = self.maker.engine(self.adapters[name] if name else None)
        return self._engines[name]

    def choose(self, name: str | None) -> None:
        """Let an adapter answer from now on, None for the base.

        Raises:
            UserError: there is no such adapter.
        """
        if name is not None and name not in self.adapters:
            known = ", ".join([*self.names, "off"])
            raise UserError(f"no adapter {name!r}; there is {known}; NAME=PATH loads another")
        self.engine(name)
        self.current = name

    def add(self, name: str, path: str) -> None:
        """Load one more adapter beside the others.

        Raises:
            UserError: it cannot be read, does not fit, or the name is taken.
        """
        if name in self.adapters:
            raise UserError(f"there is an adapter {name!r} already; choose another name")
        if self.merged:
            raise UserError("the first adapter is merged into the base; leave out --merge_weights")
        adapter = read_adapter(path)
        if self.adapters:
            self.adapters[name] = self._beside(adapter)
        else:
            self.model = self.maker.model = attach_adapter(self.maker.plain, adapter)
            self._engines.clear()  # the base is now what is left when the adapter is off
            self.adapters[name] = FIRST
        self.model.eval()

    def _beside(self, adapter: Adapter) -> str:
        """Put one more adapter beside the others; returns peft's name for it."""
        check_fits(adapter, self.maker.plain)
        inner = (
            f"voice_{len(self.adapters)}"  # it becomes a module's name: no dots, no words of torch
        )
        try:
            result = self.model.load_adapter(str(adapter.path), adapter_name=inner)
            missing = [key for key in result.missing_keys if f".{inner}." in key]
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            missing = [" ".join(str(error).split())[:200]]
        if missing:
            if inner in self.model.peft_config:
                self.model.delete_adapter(inner)
            raise UserError(f"{adapter.path}: peft cannot load it, first {missing[0]}")
        return inner


def load_voices(args: argparse.Namespace, get_kernel: Callable = lambda: None) -> Voices:
    """Load what the command line asks for.

    Raises:
        UserError: a folder is missing or damaged, or base and adapter do not belong together.
    """
    adapters = adapters_of(args.lora_model)
    device = pick_device(args.device)
    dtype = pick_dtype(args.torch_dtype, device)
    base = args.base_model or recorded_base(next(iter(adapters.values())))
    if not adapters:
        model, tokenizer = load_base(base, dtype, device, trust_remote_code=args.trust_remote_code)
        return Voices(model, tokenizer, EngineMaker(model, args.engine, get_kernel), {})
    (name, path), *others = adapters.items()
    # a merge starts from float32 and rounds last
    load_as = "float32" if args.merge_weights else args.torch_dtype
    lora, tokenizer = load_adapter_on_base(
        base, path, args.device, load_as, trust_remote_code=args.trust_remote_code
    )
    maker = EngineMaker(lora, args.engine, get_kernel)
    rounded = (
        dtype != torch.float32
    )  # then the fast engine, which adds the adapter in, does not fit
    alone = args.merge_weights and not others and not args.compare
    if alone and (rounded or maker.engine(FIRST).name == "generate"):
        merged = merge(lora, dtype)
        maker = EngineMaker(merged, args.engine, get_kernel)
        return Voices(merged, tokenizer, maker, {name: None})
    voices = Voices(lora, tokenizer, maker, {name: FIRST})
    for other, path in others:
        voices.add(other, path)
    return voices


def recorded_base(adapter: str) -> str:
    """The base that an adapter's own configuration names.

    Raises:
        UserError: it names none, or none that is here.
    """
    if not (Path(adapter) / CONFIG).is_file():
        raise UserError(f"{adapter}: no adapter folder ({CONFIG} is not there); give --base_model")
    base = read_json(Path(adapter) / CONFIG).get("base_model_name_or_path")
    if not base or not Path(base).is_dir():
        raise UserError(f"{adapter} was trained on {base}, which is not here; give --base_model")
    return base
