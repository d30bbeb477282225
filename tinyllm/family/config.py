"""Configuration of tiny-llm-zh models: Qwen2's, with the family's name and defaults."""

from __future__ import annotations

from transformers.models.qwen2.configuration_qwen2 import Qwen2Config

MODEL_TYPE = "tinyllm"
EOS_TOKEN_ID, PAD_TOKEN_ID = 2, 0


class TinyllmConfig(Qwen2Config):
    """What ``config.json`` of such a folder says, completed.

    The folders are written without token ids; keys that a hand-made file lacks mean what the
    family's own code takes for them, which is not always what Qwen2 does.  The family knows no
    sliding window, so a stray key cannot switch one on.
    """

    model_type = MODEL_TYPE

    vocab_size: int = 64797
    intermediate_size: int = 11008
    num_key_value_heads: int | None = None  # as many as there are query heads
    max_position_embeddings: int = 2048
    eos_token_id: int | list[int] | None = EOS_TOKEN_ID
    pad_token_id: int | None = PAD_TOKEN_ID
    # for a folder whose tokenizer_config.json is missing or names no class
    tokenizer_class: str | None = "ChatGLMTokenizer"

    def __post_init__(self, **kwargs) -> None:
        self.use_sliding_window, self.layer_types = False, None
        self.eos_token_id = EOS_TOKEN_ID if self.eos_token_id is None else self.eos_token_id
        self.pad_token_id = PAD_TOKEN_ID if self.pad_token_id is None else self.pad_token_id
        kwargs.pop("auto_map", None)  # names code files that are never run, nor saved again
        super().__post_init__(**kwargs)
