"""Who can answer: the base, and each of its adapters, all loaded once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from tinyllm.adapter import (
    CONFIG,
    attach_adapter,
    load_adapter_on_base,
    merge,
    own_tokenizer,
    read_adapter,
    same_tokenizer,
)
from tinyllm.base import (
    load_base,
    load_tokenizer,
    pick_device,
    pick_dtype,
    read_json,
    resolve_base,
)
from tinyllm.base_record import verify_base
from tinyllm.chat.options import adapters_of
from tinyllm.decode.pick import EngineMaker
from tinyllm.errors import UserError
from tinyllm.known_bases import known_base
from tinyllm.quantize import quantize

FIRST = "default"  # peft's name for the first adapter


class Voices:
    """A base, its adapters by name, and an engine for each.

    Attributes:
        current: name of the adapter that answers; None for the base.
        merged: the adapter's name where it is merged into the weights, so that no base is left.
    """

    def __init__(
        self, model, tokenizer, maker: EngineMaker, adapters: dict[str, str | None],
        base: str, force: bool = False,
    ) -> None:  # fmt: skip
        """Keep what is loaded.

        Args:
            adapters: our names → peft's, None where merged.
            base: the base's folder, which further adapters must have been made for.
            force: take them also when they were not.
        """
        self.model, self.tokenizer, self.maker, self.adapters = model, tokenizer, maker, adapters
        self.base, self.force = base, force
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
        tokenizer = own_tokenizer(adapter) or self.tokenizer
        same_tokenizer(
            {"base" if not self.adapters else self.names[0]: self.tokenizer, name: tokenizer}
        )
        verify_base(adapter.path, self.base, load_tokenizer(self.base), tokenizer, self.force)
        if self.adapters:
            # it becomes a module's name: no dots, no words of torch
            inner = f"voice_{len(self.adapters)}"
            try:
                attach_adapter(self.model, adapter, name=inner, force=self.force)
            except UserError:
                if inner in self.model.peft_config:
                    self.model.delete_adapter(inner)  # peft keeps what it has begun to load
                raise
        else:
            inner = FIRST
            self.model = attach_adapter(self.maker.plain, adapter, force=self.force)
            self.maker.model = self.model
            self._engines.clear()  # the base is now what is left when the adapter is off
        self.adapters[name] = inner
        self.model.eval()


def load_voices(args: argparse.Namespace, get_kernel: Callable = lambda: None) -> Voices:
    """Load what the command line asks for.

    Raises:
        UserError: a folder is missing or damaged, or base and adapter do not belong together.
    """
    adapters = adapters_of(args.lora_model)
    device = pick_device(args.device)
    dtype = pick_dtype(args.torch_dtype, device)
    base = resolve_base(args.base_model or recorded_base(next(iter(adapters.values()))))
    if not adapters:
        model, tokenizer = load_base(base, dtype, device, trust_remote_code=args.trust_remote_code)
        if args.quantize:
            quantize(model, args.quantize)
        return Voices(
            model, tokenizer, EngineMaker(model, args.engine, get_kernel), {}, base, args.force
        )
    (name, path), *others = adapters.items()
    # a merge starts from float32 and rounds last
    load_as = "float32" if args.merge_weights else args.torch_dtype
    lora, tokenizer = load_adapter_on_base(
        base, path, args.device, load_as, trust_remote_code=args.trust_remote_code,
        force=args.force, quantize=None if args.merge_weights else args.quantize,
    )  # fmt: skip
    maker = EngineMaker(lora, args.engine, get_kernel)
    rounded = (
        dtype != torch.float32
    )  # then the fast engine, which adds the adapter in, does not fit
    alone = args.merge_weights and not others and not args.compare
    if args.quantize and args.merge_weights and not alone:
        raise UserError("--quantize with --merge_weights: give one adapter, and no --compare")
    if alone and (rounded or args.quantize or maker.engine(FIRST).name == "generate"):
        merged = merge(lora, dtype)
        if args.quantize:
            quantize(merged, args.quantize)
        maker = EngineMaker(merged, args.engine, get_kernel)
        return Voices(merged, tokenizer, maker, {name: None}, base, args.force)
    voices = Voices(lora, tokenizer, maker, {name: FIRST}, base, args.force)
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
    if not base or not (Path(base).exists() or known_base(base)):
        raise UserError(f"{adapter} was trained on {base}, which is not here; give --base_model")
    return base
