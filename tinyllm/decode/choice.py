"""Logits → the next id, as ``generate`` chooses it: the same processors, in the same order."""

from __future__ import annotations

import torch
from transformers.generation import (
    GenerationConfig,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

DEFAULT_TOP_K = 50  # what generate takes where neither base nor user says anything
HANDLED = {
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens",
    "max_length", "eos_token_id", "pad_token_id", "bos_token_id", "transformers_version", "use_cache",
    "cache_implementation", "disable_compile",
}  # fmt: skip
NEUTRAL = {
    "num_beams": 1, "num_return_sequences": 1, "min_length": 0, "length_penalty": 1.0, "typical_p": 1.0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0,
    "diversity_penalty": 0.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "num_beam_groups": 1,
    "assistant_confidence_threshold": 0.4, "num_assistant_tokens": 20, "target_lookbehind": 10,
    "num_assistant_tokens_schedule": "constant", "assistant_lookbehind": 10,
}  # fmt: skip


def unsupported_options(config: GenerationConfig) -> list[str]:
    """Options that only ``generate`` itself knows what to do with."""
    given = {k: v for k, v in config.to_diff_dict().items() if v not in (None, False)}
    return sorted(
        name
        for name, value in given.items()
        if name not in HANDLED and NEUTRAL.get(name) != value and not name.startswith("_")
    )


class Choice:
    """Chooses ids by a ``GenerationConfig``."""

    def __init__(self, config: GenerationConfig) -> None:
        assert not unsupported_options(config), unsupported_options(config)
        self.sample = bool(config.do_sample)
        self.processors = processors(config)

    def __call__(
        self, ids: torch.Tensor, logits: torch.Tensor, generators: list | None = None
    ) -> torch.Tensor:
        """The next id of each row, ``(rows,)``.

        Args:
            ids: everything so far, ``(rows, T)``; it matters which ids occur, not where.
            logits: ``(rows, V)``, left unchanged.
            generators: one random generator per row; None for torch's own.
        """
        scores = logits
        for process in self.processors:
            scores = process(ids, scores)
        if not self.sample:
            return scores.argmax(-1)
        shares = scores.softmax(-1)
        if generators is None:
            return torch.multinomial(shares, 1)[:, 0]
        drawn = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(shares, generators, strict=True)
        ]
        return torch.cat(drawn)


def processors(config: GenerationConfig) -> list:
    """What a config asks for, in the order in which ``generate`` applies it."""
    wanted = []
    if config.repetition_penalty not in (None, 1.0):
        wanted.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if not config.do_sample:
        return wanted
    top_k = DEFAULT_TOP_K if config.top_k is None else config.top_k
    if config.temperature not in (None, 1.0):
        wanted.append(TemperatureLogitsWarper(config.temperature))
    nucleus = config.top_p is not None and config.top_p < 1.0
    if top_k and nucleus:
        wanted.append(TopKTopP(top_k, config.top_p))
    elif top_k:
        wanted.append(TopKLogitsWarper(top_k))
    elif nucleus:
        wanted.append(TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        wanted.append(MinPLogitsWarper(config.min_p))
    return wanted


class TopKTopP:
    """``TopKLogitsWarper``, then ``TopPLogitsWarper``, without sorting the whole vocabulary: what is
    not among the first k has no share in the sums. Where ids tie at an edge, the two themselves decide.
    """

    def __init__(self, top_k: int, top_p: float) -> None:
        self.top_k, self.top_p = top_k, top_p
        self.both = TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` ``(rows, V)`` with minus infinity for what is left out."""
        best = torch.topk(scores, min(self.top_k + 1, scores.shape[-1]))[0]  # (rows, k + 1)
        rising = best[:, : self.top_k].flip(-1)
        out = rising.softmax(-1).cumsum(-1) <= 1 - self.top_p
        out[:, -1] = False  # the likeliest stays
        edge = out.sum(-1, keepdim=True)  # of each row, how many of the k are left out
        lowest, below = rising.gather(-1, edge), rising.gather(-1, (edge - 1).clamp(min=0))
        ties = ((edge > 0) & (below == lowest)).any() or (best[:, -1] == best[:, -2]).any()
        if best.shape[-1] <= self.top_k or ties:
            for warper in self.both:
                scores = warper(ids, scores)
            return scores
        return scores.masked_fill(scores < lowest, -float("inf"))


def stops_of(config: GenerationConfig) -> set[int]:
    """The ids that end a reply."""
    stops = config.eos_token_id
    return set(stops if isinstance(stops, list) else [stops]) - {None}
