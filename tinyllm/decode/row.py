"""A model behind ``row.c``: its tensors where they lie, and the cache of one conversation."""

from __future__ import annotations

import ctypes

import torch

from tinyllm.decode import kernel
from tinyllm.decode.compact import Compact
from tinyllm.decode.pages import Pages

MAX_RANK = 1024  # of row.c's own buffer
MAX_THREADS = 4  # more have nothing to do in a model that this engine is for


class RowDecoder:
    """Takes in ids and gives logits, as :class:`tinyllm.decode.llama.Decoder` does for one row.

    The model's tensors are used in place; those that are bfloat16 numbers get a smaller copy.
    """

    def __init__(
        self, library: ctypes.CDLL, model, adapter: str | None, compact: Compact, context: int
    ) -> None:
        """Point the kernel to a model.

        Args:
            model: a plain llama-like transformers model, its layers perhaps wrapped by peft.
            adapter: name of the adapter to add in; None for none.
            context: longest sequence, in tokens.
            compact: the base's weights in fewer bytes, shared between its decoders.
        """
        config, decoder = model.config, model.model
        self.library, self.compact, self.keep, self.pages = library, compact, [], Pages()
        self.context = min(context, config.max_position_embeddings)
        attention = decoder.layers[0].self_attn
        dim, kv_heads = attention.head_dim, config.num_key_value_heads
        cache = torch.zeros(2, len(decoder.layers), kv_heads, self.context, dim)
        angles = torch.outer(
            torch.arange(self.context).float(), decoder.rotary_emb.inv_freq.float()
        )
        layers = (kernel.Layer * len(decoder.layers))()
        for at, (native, layer) in enumerate(zip(layers, decoder.layers, strict=True)):
            self._fill(native, layer, adapter)
            native.keys, native.values = self._at(cache[0, at]), self._at(cache[1, at])
        self.model = kernel.Model(
            embedding=self._at(decoder.embed_tokens.weight), norm=self._at(decoder.norm.weight),
            cos=self._at(angles.cos()), sin=self._at(angles.sin()),
            layers=ctypes.addressof(layers), head=self._linear(model.lm_head, None),
            num_layers=len(layers), hidden=config.hidden_size, inner=config.intermediate_size,
            heads=config.num_attention_heads, kv_heads=kv_heads, dim=dim, context=self.context,
            eps=config.rms_norm_eps, threads=min(torch.get_num_threads(), MAX_THREADS),
        )  # fmt: skip
        self.keep.append(layers)
        self.model.scratch = self._at(torch.empty(library.scratch_size(self.model)))
        self.logits = torch.empty(1, config.vocab_size)

    def read(self, ids: list[int], start: int = 0) -> torch.Tensor:
        """Take in ids at positions ``start`` and on.

        Returns:
            The logits after the last of them, ``(1, V)``; overwritten by the next call.
        """
        assert start >= 0 and start + len(ids) <= self.context and ids
        array = (ctypes.c_int64 * len(ids))(*ids)
        self.library.forward(self.model, array, len(ids), start, self.logits.data_ptr())
        return self.logits

    def _fill(self, native, layer, adapter: str | None) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        native.attention_norm = self._at(layer.input_layernorm.weight)
        native.mlp_norm = self._at(layer.post_attention_layernorm.weight)
        for part, names in ((attention, "qkvo"), (mlp, ("gate", "up", "down"))):
            for name in names:
                setattr(native, name, self._linear(getattr(part, f"{name}_proj"), adapter))

    def _linear(self, linear, adapter: str | None):
        base = getattr(linear, "base_layer", linear)
        weight = base.weight.detach()
        stored, (out, size) = self.compact.of(weight), weight.shape
        matrix = kernel.Matrix(
            weight=self._at(stored.weight), in_=size, out=out, kind=stored.kind,
            table=None if stored.table is None else self._at(stored.table),
        )  # fmt: skip
        native = kernel.Linear(w=matrix, bias=None if base.bias is None else self._at(base.bias))
        if stored.strays is not None:
            native.strays, native.num_strays = self._at(stored.strays), len(stored.strays)
        if adapter is not None and adapter in getattr(linear, "lora_A", {}):
            lora_a, lora_b = linear.lora_A[adapter].weight, linear.lora_B[adapter].weight
            blocks = in_blocks(lora_b.detach().float(), self.library.lanes())
            native.a = self._at(self.pages.copy(lora_a.detach().float()))
            native.b = self._at(self.pages.copy(blocks))
            native.rank, native.scale = lora_a.shape[0], linear.scaling[adapter]
        return native

    def _at(self, tensor: torch.Tensor) -> int:
        """The address of a tensor that stays alive as long as this decoder."""
        tensor = tensor.detach().contiguous()
        self.keep.append(tensor)
        return tensor.data_ptr()


def in_blocks(lora_b: torch.Tensor, lanes: int) -> torch.Tensor:
    """``(out, rank)`` as ``(out / lanes, rank, lanes)``, the last block filled with zeros."""
    out, rank = lora_b.shape
    filled = torch.cat([lora_b, lora_b.new_zeros(-out % lanes, rank)])
    return filled.view(-1, lanes, rank).transpose(1, 2).contiguous()


def fits_kernel(model, adapter: str | None = None) -> bool:
    """Whether the adapter's every rank is one that ``row.c`` has room for."""
    ranks = [
        m.r.get(adapter, 0) for m in model.modules() if isinstance(getattr(m, "r", None), dict)
    ]
    return max(ranks, default=0) <= MAX_RANK
