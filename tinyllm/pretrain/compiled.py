"""Decoder layers compiled for a CPU, for a third more steps a minute.

Attention is then the plain one (`eager`): at rows of 512 its products in bfloat16 take less time
than the backward pass of PyTorch's CPU kernel. `python -m benchmarks.pretrain_choices --minutes 1
shipped not_compiled` measures both.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._dynamo.exc import BackendCompilerFailed
from transformers import LlamaForCausalLM

from tinyllm.errors import UserError
from tinyllm.native_bf16 import cpu_multiplies_bf16

log = logging.getLogger(__name__)


def compiler_fault() -> str:
    """Why this machine cannot compile for its CPU (no compiler, no Python headers); empty if it can."""
    probe = torch.compile(lambda x: x.sin() + 1)
    try:
        probe(torch.ones(8))
    except (BackendCompilerFailed, RuntimeError, OSError) as error:
        return f"{error}".strip().split("\n")[0] or type(error).__name__
    return ""


def compile_layers(model: LlamaForCausalLM, choice: str, precision: str) -> bool:
    """Compile each layer in place; names of the weights stay as they are.

    `choice` is `on`, `off` or `auto`: on a CPU that multiplies bfloat16, if it has a compiler.

    Raises:
        UserError: `on`, and there is no working compiler.
    """
    suits = precision == "bf16" and cpu_multiplies_bf16() and not torch.cuda.is_available()
    wanted = choice == "on" or (choice == "auto" and suits)
    if not wanted:
        return False
    if fault := compiler_fault():
        if choice == "on":
            raise UserError(
                f"compile is on, but this machine cannot compile ({fault}); install a C++ compiler "
                "and Python's headers, or choose --compile off"
            )
        log.info("layers are not compiled: %s", fault)
        return False
    if not torch.cuda.is_available():
        model.set_attn_implementation("eager")
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    return True


@contextmanager
def as_written() -> Iterator[None]:
    """Inside, nothing is compiled: evaluations and samples would compile for every length."""
    with torch.compiler.set_stance("force_eager"):
        yield
