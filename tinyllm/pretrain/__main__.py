"""Run the pretraining: every stage in order, each skipped when its output is complete."""

import logging
import sys
from pathlib import Path

from transformers.utils import logging as transformers_logging

from tinyllm.pretrain import corpus, export, sources, train, vocabulary
from tinyllm.pretrain.settings import Settings, parse

log = logging.getLogger("tinyllm.pretrain")


def fetch_paths(settings: Settings) -> dict:
    """Fetched packages by source name; none with `--sources none`."""
    if settings.sources == "none":
        return {}
    names = [] if settings.sources == "all" else settings.sources.split(",")
    chosen = sources.selected(names, settings.share_alike)
    return sources.fetch_all(chosen, settings.path("sources"), settings.strict)


def main(arguments: list[str]) -> None:
    """Sources, corpus, vocabulary, training, export."""
    settings = parse(arguments)
    paths = fetch_paths(settings)
    folder = settings.path("corpus")
    counts = corpus.build(Path(settings.own_text), paths, folder)
    train_texts = corpus.by_source(corpus.read_jsonl(folder / "train.jsonl"))
    heldout_texts = corpus.by_source(corpus.read_jsonl(folder / "heldout.jsonl"))
    tokenizer = vocabulary.build(
        train_texts, settings.path("tokenizer"), settings.vocab_size, settings.max_length
    )
    run = train.Run(settings, tokenizer, train_texts, heldout_texts, counts["digest"])
    train.train(run)
    if run.accelerator.is_main_process and settings.stage != "stable":
        export.export(run, counts["sources"], Path(settings.export_to))


if __name__ == "__main__":
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout
    )
    transformers_logging.set_verbosity_error()
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
