"""A llama-like decoder whose layers follow each other without modules between, for training on a CPU.

What a layer computes with is looked up for all of them before the first one runs, and the last one goes
only where its result is wanted: behind its attention no position sees another, so that a position
of which nothing is learned needs neither its MLP nor the norm.  Any case that ``fused_layers.py`` does
not take goes to transformers' own forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from tinyllm.fast_lora import has_hooks
from tinyllm.native import attention
from tinyllm.one_node import DecoderLayer, LayerParts

# What comes with packed examples (:func:`tinyllm.batches.model_inputs`); the mask is no mask then.
NEEDED = {"position_ids", "cu_seq_lens_q", "max_length_q"}
KNOWN = NEEDED | {"attention_mask", "use_cache", "cu_seq_lens_k", "max_length_k"}
MORE = ("output_hidden_states", "output_attentions")  # that a configuration may ask for


class KnownParts:
    """What the layers of a model compute with, looked up once, while nothing changes it.

    Attributes:
        longest: tokens of an example, up to which that is known to be right.
    """

    def __init__(self) -> None:
        self.layers: list[LayerParts] = []
        self.longest = 0

    def forget(self) -> None:
        """Look up anew next time."""
        self.layers, self.longest = [], 0

    def __reduce__(self) -> tuple:
        """A copy or a pickle of the model has none."""
        return type(None), ()


class FusedModel(nn.Module):
    """Put before a decoder's class: its ``forward`` where each layer can be one node of autograd."""

    known: KnownParts | None = None

    def forward(self, input_ids=None, *args, keep: torch.Tensor | None = None, **kwargs):
        """As ever; with ``keep`` ``(n,)`` the last hidden states are those of these positions alone, none of which
        comes twice, ``(1, n, hidden_size)``.
        """
        given = {name: value for name, value in kwargs.items() if value is not None}
        if self.known is not None and not self.training:
            self.known.forget()  # evaluations may be of other adapters, or of none
        if args or input_ids is None or not self._is_plain(input_ids, given):
            found = super().forward(input_ids, *args, **kwargs)
        else:
            x = self.embed_tokens(input_ids)
            if (hidden := self._through_layers(x, given, keep)) is not None:
                return BaseModelOutputWithPast(last_hidden_state=hidden)
            # embedded only once: that may draw noise
            found = super().forward(**kwargs | {"inputs_embeds": x})
        if keep is not None:
            found.last_hidden_state = found.last_hidden_state[:, keep]
        return found

    def _is_plain(self, input_ids: torch.Tensor, given: dict) -> bool:
        """Whether it is training on packed examples and nothing else."""
        return (
            self.training
            and NEEDED <= given.keys() <= KNOWN
            and not given.get("use_cache", self.config.use_cache)
            and not any(getattr(self.config, name, False) for name in MORE)
            and len(input_ids) == 1
            and not torch.is_autocast_enabled("cpu")
        )

    def _through_layers(self, x: torch.Tensor, given: dict, keep) -> torch.Tensor | None:
        """The last hidden states; None where a layer cannot be one node."""
        angles = self.rotary_emb(x, given["position_ids"])
        given = {**given, "position_embeddings": angles}
        layers = self._parts(x, given)
        if layers is None:
            return None
        starts, angles = given["cu_seq_lens_q"], [one[0].float() for one in angles]
        layers = [one._replace(attend=(*angles, starts, one.attend[-1])) for one in layers]
        keeps_some = keep is not None and 0 < len(keep) < x.shape[1]
        if keeps_some:
            layers[-1] = layers[-1]._replace(keep=keep)
        x = x.squeeze(0)
        for layer, parts in zip(self.layers, layers, strict=False):
            if layer.gradient_checkpointing:
                x = layer(x[None], keep=parts.keep, **given).squeeze(0)
            else:
                x = DecoderLayer.apply(x, parts, *parts.adapters())
        x = self.norm(x)[None]
        return x if keep is None or keeps_some else x[:, keep]

    def _parts(self, x: torch.Tensor, given: dict) -> list[LayerParts] | None:
        """Of each layer; None where one cannot be one node, or somebody looks at it."""
        known, longest = self.known, given["max_length_q"]
        if known is not None and longest <= known.longest:
            return known.layers
        layers = self.layers[: self.config.num_hidden_layers]
        if not all(hasattr(one, "parts") and not has_hooks(one) for one in layers):
            return None
        found = [layer.parts(x, given) for layer in layers]
        if None in found:
            return None
        if known is not None:  # of batches with longer ones some may be another's affair
            known.layers, known.longest = found, min(longest, attention.LONG)
        return found


@contextlib.contextmanager
def parts_stay(model: nn.Module, callbacks: Iterable = ()) -> Iterator[None]:
    """Meanwhile nobody changes what a causal model's decoder computes with but the adapters' numbers: no adapter
    is switched, merged or thawed, no weight replaced and no hook set, unless an evaluation follows.

    Where a callback of the Trainer is neither transformers' nor ours, all of that is looked for in every step.
    """
    decoder = model.base_model
    owners = {type(callback).__module__.split(".")[0] for callback in callbacks}
    if not (isinstance(decoder, FusedModel) and owners <= {"transformers", "tinyllm"}):
        yield
        return
    decoder.known = KnownParts()
    try:
        yield
    finally:
        decoder.known = None
