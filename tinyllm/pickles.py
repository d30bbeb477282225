"""Files of torch are pickles, and a pickle can run any code: what may be read, and how.

Plain checkpoints are read by transformers with ``weights_only``.  DeepSpeed reads its own without,
so that :func:`weights_only` forces it; its few harmless classes are named here.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

FORCE, FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
PICKLES = (".pt", ".pth", ".bin")
# Written in torch's old format, which cannot be looked through; weights_only has to do.
DEEPSPEED_FOLDER = re.compile(r"global_step\d+/")
# Classes without side effects: numpy's random state, and what DeepSpeed keeps beside its tensors.
NUMPY = ("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct",
         "numpy.ndarray", "numpy.dtype", "numpy.dtypes.UInt32DType")  # fmt: skip
DEEPSPEED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def unsafe_pickle(folder: Path, files: Iterable[Path]) -> str | None:
    """Why a file may not be read, None when all are harmless; nothing is executed to find out."""
    import torch

    for path in files:
        name = path.relative_to(folder).as_posix()
        if path.suffix not in PICKLES or DEEPSPEED_FOLDER.match(name):
            continue
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception as error:  # whatever it is, it is no file of torch's
            return f"{name} cannot be read ({type(error).__name__})"
        if strange := sorted(set(names) - set(NUMPY) - set(DEEPSPEED)):
            return f"{name} holds more than tensors ({', '.join(strange[:3])}), and is not opened"
    return None


@contextlib.contextmanager
def weights_only(with_deepspeed: bool) -> Iterator[None]:
    """Make every ``torch.load`` refuse anything but tensors and the harmless classes above."""
    import torch

    before = {name: os.environ.pop(name, None) for name in (FORCE, FORBID)}
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_classes(DEEPSPEED) if with_deepspeed else []):
            yield
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _classes(names: tuple[str, ...]) -> list:
    found = []
    for name in names:
        module, _, attribute = name.rpartition(".")
        found.append(getattr(importlib.import_module(module), attribute))
    return found
