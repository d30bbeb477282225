"""Keeps libraries from talking over our output; what a user has chosen in the environment wins."""

from __future__ import annotations

import os
import warnings


def quiet_libraries() -> None:
    """Turn off telemetry, loading bars and the start-up remarks of transformers and peft."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # peft 0.21 asks transformers 5.24 by a name that the latter has renamed
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
