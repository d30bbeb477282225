"""How much memory a LoRA training needs on each GPU, by counting what is kept.

Counted for a llama-like decoder with a frozen base, float32 LoRA weights, packed rows without
padding, scaled-dot-product attention and no gradient checkpointing.  Sharding follows Rajbhandari et
al. 2020 (ZeRO, arXiv:1910.02054).  docs/memory.md says what is left out and how well it holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FLOAT = 4
BUCKET_ELEMENTS = 20_000_000  # reduce_bucket_size of configs/zero1.json, zero2.json and zero3.json
LIVE_ELEMENTS = 500_000_000  # stage3_max_live_parameters of configs/zero3.json


@dataclass(frozen=True)
class Shape:
    """What of a base decides about memory; names as in its ``config.json``."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool
    head_dim: int = 0

    @property
    def width(self) -> int:
        """Width of all query heads together."""
        size = self.head_dim or self.hidden_size // self.num_attention_heads
        return size * self.num_attention_heads

    @property
    def kv_width(self) -> int:
        return self.width // self.num_attention_heads * self.num_key_value_heads

    @property
    def linears(self) -> list[tuple[int, int]]:
        """``(inputs, outputs)`` of the seven linear layers of a block."""
        h, i = self.hidden_size, self.intermediate_size
        return [(h, self.width), (h, self.kv_width), (h, self.kv_width), (self.width, h),
                (h, i), (h, i), (i, h)]  # fmt: skip

    @property
    def linear_parameters(self) -> int:
        """Weights that every token is multiplied with, the head left out."""
        return self.num_hidden_layers * sum(a * b for a, b in self.linears)

    @property
    def parameters(self) -> int:
        """All weights of the base (norms included, biases not)."""
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        norms = self.hidden_size * (2 * self.num_hidden_layers + 1)
        return self.linear_parameters + tables + norms

    def lora_parameters(self, r: int) -> int:
        """Weights of an adapter of rank ``r`` on all seven linear layers."""
        return self.num_hidden_layers * r * sum(a + b for a, b in self.linears)


# Shapes of widely used bases.
SHAPES = (
    Shape("0.5B", 896, 4864, 24, 14, 2, 151_936, True),
    Shape("1.5B", 1536, 8960, 28, 12, 2, 151_936, True),
    Shape("7B", 3584, 18_944, 28, 28, 4, 152_064, False),
)


@dataclass(frozen=True)
class Training:
    """How it is trained.

    Attributes:
        tokens: of a micro-batch on one GPU, MBS x the longest example at most.
        learned: share of the tokens that are supervised, and so have logits.
        stage: ZeRO stage 0 to 3, None without DeepSpeed.
        dropout: whether the LoRA layers have dropout.
        mask_bytes: of one element of a dropout mask; PyTorch keeps a byte on a GPU, a float on a CPU.
    """

    tokens: int
    r: int = 16
    dtype: str = "bfloat16"
    learned: float = 1.0
    gpus: int = 1
    stage: int | None = None
    offload: bool = False
    dropout: bool = True
    mask_bytes: int = 1

    @property
    def whole_logits(self) -> bool:
        """One process computes the loss a few positions at a time, a wrapped model all at once."""
        return self.gpus > 1 or self.stage is not None


def memory(shape: Shape, how: Training) -> dict[str, float]:
    """Bytes on each GPU, by what they are for."""
    size, stage = BYTES[how.dtype], how.stage or 0
    base, lora = shape.parameters, shape.lora_parameters(how.r)
    weights = base * size
    if stage == 3:  # own part, and the layers that are fetched at a time
        own = 0 if how.offload else base / how.gpus
        weights = (own + min(LIVE_ELEMENTS, base)) * size
    optimizer = 2 * FLOAT * lora / (how.gpus if stage >= 1 else 1)
    if stage >= 1:  # DeepSpeed's own float32 copy of its part
        optimizer += FLOAT * lora / how.gpus
    return {
        "weights": weights,
        "adapter": FLOAT * lora,
        "gradients": FLOAT * lora / (how.gpus if stage >= 2 else 1),
        "buckets": _buckets(how),
        "optimizer": 0.0 if how.offload else optimizer,
        "activations": shape.num_hidden_layers * how.tokens * activations_per_token(shape, how),
        "logits": logits(shape, how),
    }


def _buckets(how: Training) -> float:
    """Room in which gradients are exchanged, twice where exchange and backward overlap."""
    if how.stage in (None, 0):
        return 0.0
    return FLOAT * BUCKET_ELEMENTS * (2 if how.stage == 2 else 1)


def activations_per_token(shape: Shape, how: Training) -> float:
    """Bytes that one block keeps of one token until its backward pass.

    A frozen linear layer keeps nothing.  A LoRA layer keeps its input in float32, which is a copy of
    its own for each layer where there is dropout (and then a mask) or where the base is not float32.
    """
    h, i, size = shape.hidden_size, shape.intermediate_size, BYTES[how.dtype]
    norms = 2 * h * FLOAT
    attention = size * (2 * shape.width + 2 * shape.kv_width)  # query, output, key, value
    mlp = size * 3 * i  # gate, its activation, up
    if how.dropout or size != FLOAT:
        mask = how.mask_bytes if how.dropout else 0
        inputs = (FLOAT + mask) * sum(inner for inner, _ in shape.linears)
    else:  # what q, k, v share, what gate and up share; the other two are kept already or once
        inputs = FLOAT * (2 * h + i)
    return norms + attention + mlp + inputs + FLOAT * how.r * len(shape.linears)


def logits(shape: Shape, how: Training) -> float:
    """Bytes of the logits and of what the loss makes of them."""
    size, elements = BYTES[how.dtype], how.tokens * how.learned * shape.vocab_size
    if how.whole_logits:  # logits, float32 copy, log-softmax, and the gradients of the last two
        return elements * (size + 3 * FLOAT)
    return min(elements, 1 << 26) * (size + FLOAT)


def flops_per_token(shape: Shape, how: Training) -> float:
    """Forward and backward: 4 a frozen weight, 6 a LoRA weight, the head where something is learned."""
    head = shape.vocab_size * shape.hidden_size * how.learned
    return 4 * (shape.linear_parameters + head) + 6 * shape.lora_parameters(how.r)


def tokens_per_second(shape: Shape, how: Training, peak_flops: float, utilisation: float) -> float:
    """Of all GPUs together, if each reaches ``utilisation`` of its peak."""
    return how.gpus * peak_flops * utilisation / flops_per_token(shape, how)


def stages(how: Training) -> dict[str, Training]:
    """The same training under each engine."""
    found = {"DDP" if how.gpus > 1 else "no DeepSpeed": replace(how, stage=None)}
    found |= {f"ZeRO-{stage}": replace(how, stage=stage) for stage in range(4)}
    found |= {f"ZeRO-{s} offload": replace(how, stage=s, offload=True) for s in (2, 3)}
    return found
