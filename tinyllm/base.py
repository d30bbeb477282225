"""Base folder → causal language model and tokenizer, checked before anything is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tinyllm.errors import UserError

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def load_base(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantisation=None,
):
    """Load a base model and its tokenizer.

    Args:
        path: a folder as ``save_pretrained`` writes it, or what :func:`resolve_base` takes.
        dtype: precision of the weights in memory.
        device: where to put the model; None leaves it on the CPU.
        attn_implementation: a name that transformers knows; None for its own choice.
        trust_remote_code: run Python code that lies in the folder.
        quantisation: transformers' configuration of a base held in fewer bits.

    Returns:
        ``(model, tokenizer)``, the model in evaluation mode.

    Raises:
        UserError: the folder is missing or incomplete, or is no causal language model.
    """
    path = resolve_base(path)
    check_base_folder(path)
    try:
        tokenizer = load_tokenizer(path, trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"{path}: its tokenizer cannot be loaded: {_one_line(error)}") from error
    kwargs = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if quantisation is not None:
        kwargs["quantization_config"] = quantisation
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs
        )
    except Exception as error:  # torch, safetensors, pickle and transformers each have their own
        raise UserError(f"{path}: the base cannot be loaded: {_one_line(error)}") from error
    if attn_implementation is None and needs_eager(model):
        model.set_attn_implementation("eager")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return (model.to(device) if device is not None else model).eval(), tokenizer


def load_tokenizer(path: str | Path, trust_remote_code: bool = False):
    """The tokenizer of a folder, as its own files describe it.

    For some model types (qwen2, gemma3_text, ...) transformers builds that family's tokenizer whatever
    the files say, and ids come out wrong without a word; a folder that asks for the general class,
    which takes everything from ``tokenizer.json``, gets it.
    """
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    config = Path(path) / "tokenizer_config.json"
    asked = read_json(config).get("tokenizer_class") if config.is_file() else None
    general = PreTrainedTokenizerFast.__name__
    if asked not in ("PreTrainedTokenizerFast", general) or type(tokenizer).__name__ == general:
        return tokenizer
    return PreTrainedTokenizerFast.from_pretrained(path)


def resolve_base(path: str | Path, accept_license: bool = False, say=None) -> str:
    """The folder of a base: what is no folder is fetched or converted first, once.

    Args:
        path: a folder, a ``.gguf`` file, or a name in :mod:`tinyllm.known_bases`.
        accept_license: the user accepts the licence of a base that is fetched.
        say: called with each line of progress; stderr otherwise.

    Raises:
        UserError: it can be neither fetched nor converted.
    """
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    if Path(path).is_dir():
        return str(path)
    from tinyllm.gguf_base import base_of_gguf
    from tinyllm.known_bases import bring, known_base

    if (known := known_base(path)) is not None:
        return str(bring(known, accept_license, say))
    if str(path).endswith(".gguf"):
        return str(base_of_gguf(Path(path), say))
    return str(path)


def check_base_folder(path: str | Path) -> None:
    """Raise a UserError that names what is missing in a base folder."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"{path}: no such base folder; give --base_model_path a folder with config.json, "
            "weights and tokenizer (./script/sft_lora.sh puts the embedded base in place), a .gguf "
            f"file, or a known name: {', '.join(known_names())}"
        )
    if not (folder / "config.json").is_file():
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = "; this is an adapter, the base is the model it was trained on"
        raise UserError(f"{path}: no config.json, so this is no base model{hint}")
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise UserError(f"{path}: no weights; expected one of {', '.join(WEIGHT_FILES)}")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{path}: the base has no tokenizer; copy its tokenizer.json there, or its "
            "tokenizer.model and tokenizer_config.json"
        )


def needs_eager(model) -> bool:
    """Whether attention scores are capped (Gemma 2), which PyTorch's kernel would leave out."""
    return bool(getattr(model.config.get_text_config(), "attn_logit_softcapping", None))


def known_names() -> list[str]:
    """Names that stand for a base which pip can bring."""
    from tinyllm.known_bases import KNOWN_BASES

    return [base.name for base in KNOWN_BASES]


def context_length(model) -> int:
    """Longest sequence the base was made for, in tokens."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 2048)


def plain_model(model):
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def pick_device(device: str = "auto") -> torch.device:
    """``auto`` is the first GPU (CUDA, else Apple's), else the CPU."""
    if device != "auto":
        try:
            found = torch.device(device)
        except RuntimeError as error:
            raise UserError(f"device {device!r}: {str(error).splitlines()[0]}") from error
        if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
            raise UserError(
                f"device {device!r}: PyTorch sees {torch.cuda.device_count()} GPU(s); use cpu or auto"
            )
        return found
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU that computes in it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        UserError: the file is missing, unreadable or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__
