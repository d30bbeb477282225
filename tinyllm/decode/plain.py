"""The engine that can do everything: ``model.generate``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from tinyllm.decode.choice import stops_of

ROWS = 16  # prompts that are answered side by side


class PlainEngine:
    """Writes with ``model.generate``.

    Attributes:
        chosen: a context in which the model has the right adapter switched on.
    """

    name = "generate"

    def __init__(
        self, model, chosen: Callable[[], AbstractContextManager] = nullcontext, why: str = ""
    ) -> None:
        self.model, self.chosen, self.why = model, chosen, why

    def objection(self, config: GenerationConfig) -> str | None:
        """``generate`` takes every option."""
        return None

    @torch.inference_mode()
    def write(
        self,
        prompt: list[int],
        config: GenerationConfig,
        on_id: Callable[[int], None] = lambda i: None,
    ) -> list[int]:
        """Ids of the reply to one prompt; ``on_id`` gets each as soon as it is chosen."""
        ids = torch.tensor([prompt], device=self.model.device)
        with self.chosen():
            output = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config,
                streamer=_Stream(on_id),
            )  # fmt: skip
        return output[0, len(prompt) :].tolist()

    def write_many(
        self,
        prompts: list[list[int]],
        config: GenerationConfig,
        on_done: Callable[[int, list[int]], None],
        seeds: list[int] | None = None,
    ) -> None:
        """Answer many prompts, a few side by side; with seeds one by one, so that each has its own."""
        if seeds is not None:
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                torch.manual_seed(seed)
                on_done(index, self.write(prompt, config))
            return
        for first in range(0, len(prompts), ROWS):
            for offset, reply in enumerate(self._write_rows(prompts[first : first + ROWS], config)):
                on_done(first + offset, reply)

    @torch.inference_mode()
    def _write_rows(self, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
        longest, stops = max(map(len, prompts)), stops_of(config)
        pad = config.pad_token_id if config.pad_token_id is not None else min(stops)
        ids = torch.full((len(prompts), longest), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        device = self.model.device
        with self.chosen():
            output = self.model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
            )
        return [_until_stop(row, stops) for row in output[:, longest:].tolist()]


def _until_stop(ids: list[int], stops: set[int]) -> list[int]:
    """Cut the padding that follows the end of a row that ended before the others."""
    end = next((at + 1 for at, one in enumerate(ids) if one in stops), len(ids))
    return ids[:end]


class _Stream(BaseStreamer):
    def __init__(self, on_id: Callable[[int], None]) -> None:
        self.on_id, self.prompt_seen = on_id, False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:  # generate() hands over the prompt first
            self.prompt_seen = True
            return
        for one in value.flatten().tolist():
            self.on_id(one)

    def end(self) -> None:
        pass
