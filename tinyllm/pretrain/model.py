"""The model: a plain `LlamaForCausalLM` of about 16M parameters, its start, and its loss."""

import math

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tinyllm.pretrain.head_loss import HeadLoss
from tinyllm.pretrain.settings import ModelSettings

IGNORE_INDEX = -100
INIT_STD = 0.02


def build_config(settings: ModelSettings) -> LlamaConfig:
    """The architecture; token ids are those of `vocabulary.SPECIAL_TOKENS`."""
    return LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_key_value_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=settings.max_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=INIT_STD,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        use_cache=True,
    )


def build_model(settings: ModelSettings, seed: int) -> LlamaForCausalLM:
    """A fresh model in float32: normal(0, 0.02), the projections that write into the residual
    stream divided by sqrt(2 * layers) (Radford et al. 2019, section 2.3).
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(build_config(settings))
    residual_std = INIT_STD / math.sqrt(2 * settings.num_layers)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, 0.0, residual_std if writes else INIT_STD)
    return model


class PackedLoss(nn.Module):
    """Summed next-token loss of packed rows; a module, so that it can be wrapped for DDP."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """All (B, T); labels are already shifted. Returns a scalar: the sum over labels.

        Positions restart at every document; without an attention mask transformers derives the
        block-diagonal causal mask from them.
        """
        hidden = self.model.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        supervised = labels != IGNORE_INDEX
        return HeadLoss.apply(hidden[supervised], self.model.lm_head.weight, labels[supervised])
