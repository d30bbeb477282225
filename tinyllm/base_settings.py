"""The settings of a base beyond its folder: licence, quantisation, the pin of its code."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from tinyllm.errors import UserError
from tinyllm.setting import setting

BASE_KINDS = "a folder, a .gguf file, or a name such as smollm2-135m or gemma3-270m"
ACCEPT_LICENSE = "You have read and accept the licence of a base that is fetched by its name."


def add_license_flag(parser: argparse.ArgumentParser) -> None:
    """``--accept_license True``, as training takes it, for the programs with a parser of their own."""
    parser.add_argument(
        "--accept_license", type=_true_or_false, nargs="?", const=True, default=False,
        help=ACCEPT_LICENSE,
    )  # fmt: skip


def _true_or_false(text: str) -> bool:
    from transformers.hf_argparser import string_to_bool

    return string_to_bool(text)


@dataclass
class BaseSourceSettings:
    """How a base is fetched, held in memory, and trusted."""

    accept_license: bool = setting(False, ACCEPT_LICENSE)
    load_in_4bit: bool = setting(
        False, "Hold the base's linear layers in 4 bits (QLoRA, arXiv:2305.14314); bitsandbytes."
    )
    load_in_8bit: bool = setting(
        False, "Hold the base's linear layers in 8 bits (arXiv:2208.07339); needs bitsandbytes."
    )
    remote_code_hash: str = setting(
        "", "Run the base's code only if it has this hash, as an earlier start printed it."
    )

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("--load_in_4bit and --load_in_8bit: choose one of the two")
        if self.remote_code_hash and not re.fullmatch(r"[0-9a-f]{64}", self.remote_code_hash):
            raise UserError("--remote_code_hash: expected 64 hexadecimal digits, as printed")

    @property
    def is_quantised(self) -> bool:
        return self.load_in_4bit or self.load_in_8bit
