"""Who can answer: the base, and each of its adapters, all loaded once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import count
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
        self._made_of: dict[str, dict[str, float]] = {}  # a sum's name → its parts, by peft's names
        self._numbers = count(1)

    @property
    def names(self) -> list[str]:
        return list(self.adapters)

    def engine(self, name: str | None):
        """What writes as this adapter, or as the base for None.

        Raises:
            UserError: the base is asked for and the adapter is merged into it.
        """
        if name is None:
            self._check_unmerged()
        if name not in self._engines:
            self._engines[name] = self.maker.engine(self.adapters[name] if name else None)
        return self._engines[name]

    def choose(self, name: str | None) -> None:
        """Let an adapter answer from now on, None for the base.

        Raises:
            UserError: there is no such adapter.
        """
        if name is not None:
            self._check_known(name)
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
            inner = self._new_name()
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

    def combine(self, weights: dict[str, float], kind: str = "cat") -> str:
        """Make the weighted sum of loaded adapters one more adapter, once; returns its name.

        Args:
            weights: weight of each adapter by our name of it.
            kind: one of :data:`tinyllm.combine.KINDS`.

        Raises:
            UserError: an adapter is unknown, a weight is no number, or peft cannot combine them.
        """
        from tinyllm.combine import check_combinable, check_kind, check_weights, combine_adapters

        self._check_unmerged()
        check_weights(weights, self.names)
        check_kind(kind)
        name = name_of_sum(weights, kind)
        parts = {self.adapters[one]: weight for one, weight in weights.items()}
        if name not in self.adapters:
            for one, inner in zip(weights, parts, strict=True):
                check_combinable(self.model, inner, one)
            inner = self._new_name()
            combine_adapters(self.model, parts, inner, kind)
            self.adapters[name], self._made_of[name] = inner, parts
        elif self._made_of.get(name) != parts:
            raise UserError(f"{name!r} is made of an adapter that is gone; /unload {name} first")
        return name

    def unload(self, name: str) -> None:
        """Take an adapter out of memory; sums that were made of it stay.

        Raises:
            UserError: there is no such adapter, or it is the one that answers.
        """
        self._check_unmerged()
        self._check_known(name)
        if name == self.current:
            raise UserError(f"{name!r} answers now; /adapter NAME or /adapter off first")
        inner = self.adapters.pop(name)
        self._made_of.pop(name, None)
        if self.adapters:  # another one is made active first, for peft warns where it has to choose
            self.model.set_adapter(next(iter(self.adapters.values())))
            self.model.delete_adapter(inner)
        else:
            self.model = self.maker.model = self.model.unload()
        self._engines.clear()  # what kept a model from the fast engine may have gone

    def _check_unmerged(self) -> None:
        if self.merged:
            raise UserError("the adapter is merged into the base; leave out --merge_weights")

    def _check_known(self, name: str) -> None:
        if name not in self.adapters:
            known = ", ".join([*self.names, "off"])
            raise UserError(f"no adapter {name!r}; there is {known}; NAME=PATH loads another")

    def _new_name(self) -> str:
        """A name for peft, where it becomes a module's: no dots, no words of torch; never used again."""
        return f"voice_{next(self._numbers)}"


def name_of_sum(weights: dict[str, float], kind: str) -> str:
    """``{"a": 0.7, "b": -0.3}`` → ``"0.7*a-0.3*b"``; another kind than ``cat`` is added."""
    terms = "".join(f"{weight:+}*{name}" for name, weight in weights.items())
    return terms.removeprefix("+") + ("" if kind == "cat" else f":{kind}")


def load_voices(args: argparse.Namespace, get_kernel: Callable = lambda: None) -> Voices:
    """Load what the command line asks for.

    Raises:
        UserError: a folder is missing or damaged, or base and adapter do not belong together.
    """
    adapters = adapters_of(args.lora_model)
    device = pick_device(args.device)
    dtype = pick_dtype(args.torch_dtype, device)
    base = args.base_model or recorded_base(next(iter(adapters.values())))
    base = resolve_base(base, args.accept_license)
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
