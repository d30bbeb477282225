"""A tokenizer → files that transformers 4 and 5 both read, and with them the engines built on either."""

from __future__ import annotations

from pathlib import Path

from tinyllm.base import read_json
from tinyllm.run_folder import write_json

CONFIG = "tokenizer_config.json"


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Save a tokenizer and its chat template under the names that older readers know too.

    transformers 5 calls a plain fast tokenizer ``TokenizersBackend`` and lists extra special tokens
    under a new name; transformers 4 (in many vLLM releases) refuses both, and 5 reads the old ones.
    """
    tokenizer.save_pretrained(folder)
    if not (folder / CONFIG).is_file():
        return
    values = read_json(folder / CONFIG)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        values.pop("backend", None)
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    write_json(folder / CONFIG, values)
