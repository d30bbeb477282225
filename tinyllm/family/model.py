"""tiny-llm-zh models: Qwen2's modules under the family's names.

Biases on q, k, v and none on o, RMSNorm, SwiGLU, rotary positions: module for module and key for key
this is Qwen2, whose code transformers maintains.
"""

from __future__ import annotations

from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2Model

from tinyllm.family.config import TinyllmConfig


class TinyllmModel(Qwen2Model):
    """The decoder without its head."""

    config_class = TinyllmConfig


class TinyllmForCausalLM(Qwen2ForCausalLM):
    """The causal language model that a tiny-llm-zh folder holds."""

    config_class = TinyllmConfig

    def adjust_generation_fn(self, *args, **kwargs) -> None:
        """Read ``generation_config.json`` and add the token ids that the folders are written without."""
        super().adjust_generation_fn(*args, **kwargs)
        generation, config = self.generation_config, self.config
        if generation.eos_token_id is None:
            generation.eos_token_id = config.eos_token_id
        if generation.pad_token_id is None:
            generation.pad_token_id = config.pad_token_id


def register() -> None:
    """Register with Auto classes that were imported before :mod:`tinyllm`."""
    AutoModel.register(TinyllmConfig, TinyllmModel, exist_ok=True)
    AutoModelForCausalLM.register(TinyllmConfig, TinyllmForCausalLM, exist_ok=True)
