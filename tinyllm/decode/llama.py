"""The forward pass of a llama-like model with a cache of fixed size: few calls, no masks for one row.

Token by token a small model spends its time in the calls around the arithmetic, so this holds only the
arithmetic: two norms, four matrix products, a rotation and an attention per layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tinyllm.decode.weights import Weights


class Decoder:
    """A model and the keys and values of ``num_rows`` sequences.

    Attributes:
        keys, values: one tensor per layer, ``(num_rows, kv heads, context, D)``.
    """

    def __init__(self, weights: Weights, num_rows: int = 1, context: int | None = None) -> None:
        self.weights = w = weights
        self.context = min(context or w.context, w.context)
        shape = (num_rows, w.num_kv_heads, self.context, w.head_dim)
        self.keys = [torch.zeros(shape) for _ in w.layers]
        self.values = [torch.zeros(shape) for _ in w.layers]
        self.rows = torch.arange(num_rows)

    def read(self, ids: list[int], start: int = 0) -> torch.Tensor:
        """Take in ids at positions ``start`` and on of the first row.

        Returns:
            The logits after the last of them, ``(1, V)``.
        """
        w, end = self.weights, start + len(ids)
        x = F.embedding(torch.tensor(ids), w.embedding)
        rotation = w.rotation[start:end, None]
        mask = _causal(start, end) if len(ids) > 1 and start else None
        for layer, keys, values in zip(w.layers, self.keys, self.values, strict=True):
            q, k, v = self._project(layer, x, rotation)
            keys[0, :, start:end] = k.transpose(0, 1)
            values[0, :, start:end] = v.transpose(0, 1)
            mixed = F.scaled_dot_product_attention(
                q.transpose(0, 1)[None], keys[:1, :, :end], values[:1, :, :end],
                attn_mask=mask, is_causal=mask is None and len(ids) > 1, enable_gqa=True,
            )  # fmt: skip
            x = self._after_attention(layer, x, mixed[0].transpose(0, 1).reshape(len(ids), -1))
        return self._logits(x[-1:])

    def share(self, ids: list[int]) -> None:
        """Let every row begin with the same ids: they are taken in once."""
        self.read(ids)
        for states in (*self.keys, *self.values):
            states[:, :, : len(ids)] = states[:1, :, : len(ids)]

    def read_many(self, prompts: list[list[int]], rows: list[int], start: int = 0) -> torch.Tensor:
        """Take in what follows position ``start`` of a prompt, for each of some rows.

        Shorter prompts are filled up behind their end: nothing before it looks there, and what is
        written there is overwritten before anything does.

        Returns:
            The logits after each prompt, ``(len(rows), V)``.
        """
        w, end = self.weights, start + max(map(len, prompts))
        ids = torch.tensor([prompt + [0] * (end - start - len(prompt)) for prompt in prompts])
        x = F.embedding(ids.reshape(-1), w.embedding)
        rotation = w.rotation[start:end, None].repeat(len(rows), 1, 1)
        mask = _causal(start, end)
        for layer, keys, values in zip(w.layers, self.keys, self.values, strict=True):
            q, k, v = (
                part.unflatten(0, ids.shape).transpose(1, 2)
                for part in self._project(layer, x, rotation)
            )
            keys[rows, :, start:end], values[rows, :, start:end] = k, v
            mixed = F.scaled_dot_product_attention(
                q, keys[rows, :, :end], values[rows, :, :end], attn_mask=mask, enable_gqa=True
            )
            x = self._after_attention(layer, x, mixed.transpose(1, 2).reshape(len(x), -1))
        width = end - start
        ends = torch.tensor([at * width + len(prompt) - 1 for at, prompt in enumerate(prompts)])
        return self._logits(x[ends])

    def keep_rows(self, rows: list[int]) -> None:
        """Forget all rows but these, which move together."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.rows = torch.arange(len(rows))

    def step(self, ids: torch.Tensor, positions: torch.Tensor, longest: int) -> torch.Tensor:
        """Take in one more id per row.

        Args:
            ids, positions: ``(num_rows,)``; a row's earlier positions have been taken in before.
            longest: the largest position.

        Returns:
            The logits after them, ``(num_rows, V)``.
        """
        w, end = self.weights, longest + 1
        x = F.embedding(ids, w.embedding)
        alone = len(ids) == 1
        rotation = w.rotation[longest:end, None] if alone else w.rotation[positions][:, None]
        mask = None if alone else (torch.arange(end) <= positions[:, None])[:, None, None]
        grouped = (len(ids), w.num_kv_heads, -1, w.head_dim)
        for layer, keys, values in zip(w.layers, self.keys, self.values, strict=True):
            q, k, v = self._project(layer, x, rotation)
            if alone:
                keys[0, :, longest], values[0, :, longest] = k[0], v[0]
            else:
                keys[self.rows, :, positions], values[self.rows, :, positions] = k, v
            mixed = F.scaled_dot_product_attention(  # the heads of a group are its queries
                q.view(grouped), keys[:, :, :end], values[:, :, :end], attn_mask=mask
            )
            x = self._after_attention(layer, x, mixed.reshape(len(ids), -1))
        return self._logits(x)

    def _project(self, layer, x: torch.Tensor, rotation: torch.Tensor):
        """Queries, keys and values ``(rows, heads, D)``, the first two rotated to their positions."""
        w = self.weights
        both = w.num_heads + w.num_kv_heads
        y = layer.qkv(F.rms_norm(x, x.shape[-1:], layer.attention_norm, w.eps))
        y = y.view(len(x), both + w.num_kv_heads, w.head_dim)
        pairs = torch.view_as_complex(y[:, :both].unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * rotation).flatten(-2)
        return turned[:, : w.num_heads], turned[:, w.num_heads :], y[:, both:]

    def _after_attention(self, layer, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """The rest of a layer: output projection, norm, gated MLP, and both residuals."""
        x = x + layer.attention_out(mixed)
        y = layer.gate_up(F.rms_norm(x, x.shape[-1:], layer.mlp_norm, self.weights.eps))
        gate, up = y.chunk(2, -1)
        return x + layer.down(F.silu(gate) * up)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weights
        return w.head(F.rms_norm(x, x.shape[-1:], w.norm, w.eps))


def _causal(start: int, end: int) -> torch.Tensor:
    """``(end - start, end)``: which positions each new one may look at."""
    return torch.arange(end) <= torch.arange(start, end)[:, None]
