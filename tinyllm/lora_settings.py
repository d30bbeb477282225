"""The settings of LoRA's variants: what is adapted, how it starts, what else is trained."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import yaml

from tinyllm.errors import UserError
from tinyllm.setting import setting

# Starts that leave the base's weights as they are, so that the adapter is right beside them.
PLAIN_STARTS = ("true", "false", "gaussian", "orthogonal")
# Starts that move a part of the base's weights into the adapter (see lora_start.py).
MOVING_STARTS = ("pissa", "olora")
# peft's starts that change the base's weights: switching such an adapter off does not give it back.
BASE_CHANGING_STARTS = (*MOVING_STARTS, "corda", "loftq", "lora_ga")
NITER = re.compile(r"pissa_niter_[1-9]\d*")


@dataclass
class LoraVariantSettings:
    """Variants of LoRA, as peft names them; every default is plain LoRA."""

    use_rslora: bool = setting(
        False, "Scale by alpha / sqrt(r) instead of alpha / r (rsLoRA, arXiv:2312.03732)."
    )
    use_dora: bool = setting(
        False,
        "Train the length of each weight row apart from its direction (DoRA, arXiv:2402.09353).",
    )
    init_lora_weights: str = setting(
        "true",
        "How the adapter starts: true (no effect at step 0), gaussian, orthogonal, pissa, "
        "pissa_niter_N (N iterations, faster), olora, or false (random, for tests).",
    )
    rank_pattern: str = setting(
        "", 'Other ranks for some layers, JSON: {"q_proj": 4, "layers.0.mlp.up_proj": 32}.'
    )
    alpha_pattern: str = setting("", "Other alphas for some layers, JSON as for rank_pattern.")
    loraplus_lr_ratio: float = setting(
        0.0,
        "Learning rate of the B matrices as a multiple of that of A (LoRA+, arXiv:2402.12354; "
        "16 is usual, with a lower --learning_rate); 0 for the same rate.",
    )
    modules_to_save: list[str] = setting(
        [], "Layers trained in full and saved with the adapter: embed_tokens, lm_head, norm, ..."
    )
    trainable_token_indices: list[int] = setting(
        [], "Token ids whose embedding is trained, alone among the embeddings."
    )
    new_special_tokens: list[str] = setting(
        [],
        "Tokens to add to the vocabulary, comma or space separated; their embeddings are trained.",
    )
    adapter_path: str = setting(
        "", "Go on training this adapter instead of a fresh one; its rank and layers are kept."
    )

    def __post_init__(self) -> None:
        self.init_lora_weights = self.init_lora_weights.lower()
        self.modules_to_save = split_names(self.modules_to_save)
        self.new_special_tokens = split_names(self.new_special_tokens)
        parse_pattern("rank_pattern", self.rank_pattern)
        parse_pattern("alpha_pattern", self.alpha_pattern)
        check_start(self.init_lora_weights)
        if self.loraplus_lr_ratio != 0 and self.loraplus_lr_ratio < 1:
            raise UserError(
                f"--loraplus_lr_ratio {self.loraplus_lr_ratio}: must be 1 or more, 16 is usual; "
                "0 turns LoRA+ off"
            )
        if any(index < 0 for index in self.trainable_token_indices):
            raise UserError("--trainable_token_indices: token ids are 0 or more")

    @property
    def moves_base_weights(self) -> bool:
        """Whether the start moves a part of the base's weights into the adapter."""
        return self.init_lora_weights.startswith(MOVING_STARTS)


def check_start(name: str) -> None:
    """Raise a UserError for a value of ``--init_lora_weights`` that cannot be served."""
    if name in (*PLAIN_STARTS, *MOVING_STARTS) or NITER.fullmatch(name):
        return
    known = f"expected {', '.join((*PLAIN_STARTS, *MOVING_STARTS))} or pissa_niter_N"
    if name == "loftq":
        raise UserError(
            "--init_lora_weights loftq: peft computes it with bitsandbytes on a GPU alone, and such an "
            "adapter is right beside the quantised base only, while one here must also fit the base "
            "itself; use --load_in_4bit True with the usual start, or pissa without it"
        )
    if name in ("eva", "corda", "lora_ga"):
        raise UserError(
            f"--init_lora_weights {name}: needs a pass over data before training, which is not "
            f"built in; {known}"
        )
    raise UserError(f"--init_lora_weights {name}: {known}")


def parse_pattern(name: str, text: str) -> dict[str, int]:
    """``'{"q_proj": 4}'`` (JSON or YAML) → ``{"q_proj": 4}``; empty text is no pattern.

    Raises:
        UserError: the text is no mapping of layer names to numbers of 1 or more.
    """
    if not text:
        return {}
    try:
        pattern = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"--{name} {text}: cannot be read as JSON: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(pattern, dict):
        raise UserError(f'--{name} {text}: expected a mapping, as in {{"q_proj": 4}}')
    for layer, value in pattern.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"--{name}: {layer} is {json.dumps(value)}, expected 1 or more")
    return {str(layer): value for layer, value in pattern.items()}


def split_names(words: list[str]) -> list[str]:
    """``["a,b", "c"]`` → ``["a", "b", "c"]``."""
    names = [name.strip() for word in words for name in word.split(",")]
    return list(dict.fromkeys(name for name in names if name))


def check_combination(lora) -> None:
    """Raise a UserError for LoRA settings that cannot work together, before anything is loaded.

    Args:
        lora: the :class:`tinyllm.settings.LoraSettings`.
    """
    if not lora.use_lora:
        _refuse_without_lora(lora)
        return
    start = lora.init_lora_weights
    if lora.moves_base_weights and lora.use_dora:
        raise UserError(
            f"--use_dora True with --init_lora_weights {start}: DoRA takes the length of the base's "
            "rows, which that start changes; choose one of the two"
        )
    if start == "orthogonal" and any(r % 2 for r in _ranks(lora)):
        raise UserError("--init_lora_weights orthogonal: needs an even rank everywhere")
    if lora.use_dora and start == "false":
        raise UserError("--use_dora True with --init_lora_weights false: DoRA starts from the base")
    both = set(lora.modules_to_save) & set(lora.lora_target_modules)
    if both:
        raise UserError(
            f"--modules_to_save {', '.join(sorted(both))}: also in --lora_target_modules; a layer is "
            "adapted or trained in full, not both"
        )
    if lora.modules_to_save and (lora.trainable_token_indices or lora.new_special_tokens):
        touched = {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out"}
        if touched & set(lora.modules_to_save):
            raise UserError(
                "--modules_to_save names the embeddings, which trains every token's; leave out "
                "--trainable_token_indices, or leave out the embeddings there"
                if lora.trainable_token_indices
                else "--modules_to_save names the embeddings, and --new_special_tokens trains its "
                "own rows of them; leave one of the two out"
            )
    if lora.adapter_path:
        _refuse_beside_adapter(lora)


def _ranks(lora) -> list[int]:
    return [lora.lora_r, *parse_pattern("rank_pattern", lora.rank_pattern).values()]


def _refuse_without_lora(lora) -> None:
    default = LoraVariantSettings()
    for name in vars(default):
        if getattr(lora, name) != getattr(default, name):
            raise UserError(f"--{name} needs --use_lora True: without LoRA every weight is trained")


def _refuse_beside_adapter(lora) -> None:
    """What an existing adapter already decides cannot be asked for again."""
    default = LoraVariantSettings()
    for name in ("use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern",
                 "modules_to_save", "trainable_token_indices", "new_special_tokens"):  # fmt: skip
        if getattr(lora, name) != getattr(default, name):
            raise UserError(
                f"--{name} with --adapter_path: the adapter brings its own; leave the setting out"
            )
