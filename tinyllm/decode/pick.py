"""Which engine writes for a model, and why."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import cache

import torch

from tinyllm.base import plain_model
from tinyllm.decode.compact import Compact
from tinyllm.decode.fast import FastEngine
from tinyllm.decode.llama import Decoder
from tinyllm.decode.plain import PlainEngine
from tinyllm.decode.row import RowDecoder, fits_kernel
from tinyllm.decode.weights import lay_out, unsupported
from tinyllm.errors import UserError

ENGINES = ("auto", "fast", "generate")
PROBE_LENGTH = 40  # more than the lanes of any processor
CACHE_BYTES = 512 * 1024**2  # keys and values of all rows together
TOLERANCE = 1e-3  # of the largest logit; a wrong weight is off by more than a tenth


class EngineMaker:
    """Makes engines for one loaded model and its adapters; they share what they can."""

    def __init__(self, model, kind: str = "auto", get_kernel: Callable = lambda: None) -> None:
        """Keep a model.

        Args:
            model: a transformers model or a PeftModel.
            kind: ``auto`` (fast where it gives the same), ``fast`` (or an error) or ``generate``.
            get_kernel: gives what :func:`tinyllm.decode.kernel.load` gives; None is torch alone.
        """
        self.model, self.kind, self.get_kernel = model, kind, get_kernel
        self.plain = plain_model(model)
        self.compact: Compact | None = None  # shared by the readers of all adapters

    def engine(self, adapter: str | None = None) -> FastEngine | PlainEngine:
        """The engine for one of the model's adapters, or for the base alone.

        Raises:
            UserError: ``fast`` was asked for and does not fit this model.
        """
        if self.kind == "generate":
            return self.plain_engine(adapter, "asked for")
        reason = unsupported(self.model)
        if reason is None:
            engine = self._fast(adapter)
            reason = self._difference(engine, adapter)
            if reason is None:
                return engine
        if self.kind == "fast":
            raise UserError(f"--engine fast: {reason}; leave it out to use what fits")
        return self.plain_engine(adapter, reason)

    def plain_engine(self, adapter: str | None, why: str) -> PlainEngine:
        """The engine that takes every model and option."""
        return PlainEngine(self.model, lambda: adapter_on(self.model, adapter), why)

    def _fast(self, adapter: str | None) -> FastEngine:
        config, layers = self.plain.config, self.plain.model.layers
        head_dim = layers[0].self_attn.head_dim
        weights = cache(lambda: lay_out(self.model, adapter))  # only where torch alone computes

        def make_rows(num_rows: int, context: int) -> Decoder:
            row_bytes = 8 * context * len(layers) * config.num_key_value_heads * head_dim
            return Decoder(weights(), max(1, min(num_rows, CACHE_BYTES // row_bytes)), context)

        def make_row(context: int):
            if compiled:
                self.compact = self.compact or Compact(library.lanes(), bool(library.packs()))
                return RowDecoder(library, self.plain, adapter, self.compact, context)
            return make_rows(1, context)

        library = self.get_kernel() if fits_kernel(self.plain, adapter) else None
        compiled = library is not None
        how = (
            "compiled"
            if compiled
            else "by torch calls: no C compiler that takes row.c, or a rank it has no room for"
        )
        return FastEngine(make_row, make_rows, config.max_position_embeddings, how)

    @torch.inference_mode()
    def _difference(self, engine: FastEngine, adapter: str | None) -> str | None:
        """Compare the engine's logits with the model's own on a few ids; None where they agree."""
        vocab, length = self.plain.config.vocab_size, min(PROBE_LENGTH, engine.context - 1)
        ids = [(7 + 131 * at) % vocab for at in range(length)]
        with adapter_on(self.model, adapter):
            expected = self.model(torch.tensor([ids])).logits[0, -1]
        found = engine.make_row(length + 1).read(ids)[0]
        limit = TOLERANCE * max(1.0, expected.abs().max().item())
        off = (found - expected).abs().max().item()
        return None if off <= limit else f"its logits are off by {off:.2g} for this model"


@contextmanager
def adapter_on(model, adapter: str | None):
    """Switch a PeftModel to one of its adapters, or off, for a while."""
    if not hasattr(model, "disable_adapter"):
        yield
    elif adapter is None:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(adapter)
        yield
