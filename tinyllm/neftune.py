"""NEFTune (Jain et al. 2023, arXiv:2310.05914) for rows that hold many examples.

Noise is added to the embeddings while training, uniform within ``alpha / sqrt(L d)``.  ``L`` is the
length of the example; transformers' own hook takes the length of the row, which here is that of a
whole micro-batch, and would make the noise smaller the more examples share it.
"""

from __future__ import annotations

import torch


class Neftune:
    """Adds the noise through a hook on the input embeddings.

    Attributes:
        lengths: of the examples in the row at hand, ``(num_examples,)``; None adds no noise.
    """

    def __init__(self, embeddings: torch.nn.Module, alpha: float) -> None:
        self.alpha = alpha
        self.lengths: torch.Tensor | None = None
        embeddings.register_forward_hook(self._add_noise)

    def _add_noise(self, module, args, output: torch.Tensor) -> torch.Tensor:
        """``output`` (1, N, d), the embeddings of N ids."""
        if not module.training or self.lengths is None:
            return output
        bound = self.bounds(self.lengths, output.shape[-1]).to(output)
        return output + torch.empty_like(output).uniform_(-1, 1) * bound[None, :, None]

    def bounds(self, lengths: torch.Tensor, width: int) -> torch.Tensor:
        """Largest noise at each position, ``(N,)``."""
        sizes = lengths.repeat_interleave(lengths) * width
        return self.alpha / sizes.sqrt()
