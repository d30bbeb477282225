"""Run the pretraining: every stage in order, each skipped when its output is complete."""

import copy
import json
import logging
import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from tinyllm.errors import UserError, run_program
from tinyllm.launcher_watch import watch_launcher
from tinyllm.pretrain import checkpoint, corpus, sources, vocabulary
from tinyllm.pretrain.export import export
from tinyllm.pretrain.exported import (
    Exported,
    adopt_tokenizer,
    between,
    read_exported,
)
from tinyllm.pretrain.own_text import text_files
from tinyllm.pretrain.run import Run
from tinyllm.pretrain.settings import Settings, parse
from tinyllm.pretrain.train import train

log = logging.getLogger("tinyllm.pretrain")


def fetch_paths(settings: Settings) -> dict[str, Path]:
    """Fetched packages by source name; none with `--sources none`."""
    if settings.sources == "none":
        return {}
    names = [] if settings.sources == "all" else settings.sources.split(",")
    chosen = sources.selected(names, settings.share_alike)
    return sources.fetch_all(chosen, settings.path("sources"), settings.strict)


def start_of(settings: Settings) -> Exported | None:
    """The exported folder that this run begins from, if it begins now and from one.

    Raises:
        UserError: the working folder holds a run that began otherwise.
    """
    if not settings.start_from:
        return None
    if path := checkpoint.last(settings.path("checkpoints")):
        before = checkpoint.load(path).get("started_from", "")
        if not before or Path(before).resolve() != Path(settings.start_from).resolve():
            raise UserError(
                f"{path} is of a run that began from {before or 'random weights'}, not from "
                f"{settings.start_from}; give --work another folder"
            )
        return None
    return read_exported(settings)


def build_run(settings: Settings) -> tuple[Run, dict]:
    """Text, tokenizer and a fresh run; also the counts of the corpus."""
    text_files(Path(settings.own_text))  # refused before anything is fetched
    start = start_of(settings)
    folder, tokenizer_folder = settings.path("corpus"), settings.path("tokenizer")
    counts = corpus.build(Path(settings.own_text), fetch_paths(settings), folder)
    train_texts = corpus.by_source(corpus.read_jsonl(folder / "train.jsonl"))
    heldout_texts = corpus.by_source(corpus.read_jsonl(folder / "heldout.jsonl"))
    tokenizer = (
        adopt_tokenizer(start, tokenizer_folder)
        if start
        else vocabulary.build(
            train_texts, tokenizer_folder, settings.vocab_size, settings.max_length
        )
    )
    run = Run(settings, tokenizer, train_texts, heldout_texts, counts["digest"])
    if start:
        run.start_from(start)
    return run, counts


def facts_of(run: Run, counts: dict, model: LlamaForCausalLM) -> dict:
    """What the model card says; results are those of the rounded weights that are exported."""
    config = model.config
    rounded = copy.deepcopy(model).to(torch.bfloat16).float()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": config.vocab_size, "layers": config.num_hidden_layers,
        "hidden": config.hidden_size, "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads, "length": run.settings.max_length,
        "steps": run.progress.step, "tokens": run.progress.tokens,
        "seconds": run.progress.seconds, "seen": run.seen, "corpus": counts["sources"],
        "optimizer": run.settings.optimizer, "start_share": run.settings.start_share,
        "own_texts": run.own_texts, "started_from": run.started_from,
        "heldout_share": corpus.HELDOUT_PER_MILLE / 1000, "results": run.evaluate(rounded),
    }  # fmt: skip


def export_run(run: Run, counts: dict) -> None:
    """Export the present weights, or what lies between them and the first, unless it was exported there already."""
    target, record = Path(run.settings.export_to), run.settings.path("exported.json")
    mark = {
        "step": run.progress.step, "seconds": run.progress.seconds, "folder": str(target),
        "start_share": run.settings.start_share,
    }  # fmt: skip
    done = json.loads(record.read_text(encoding="utf-8")) if record.exists() else None
    if run.settings.stage != "export" and target.exists() and done == mark:
        log.info("export: up to date")
        return
    run.check_export()
    share = run.settings.start_share
    model = between(run.model, run.start, share) if share else run.model
    export(model, run.tokenizer, facts_of(run, counts, model), target)
    record.write_text(json.dumps(mark), encoding="utf-8")


def main() -> None:
    """Sources, corpus, vocabulary, training, export."""
    watch_launcher()
    settings = parse(sys.argv[1:])
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout
    )
    transformers_logging.set_verbosity_error()
    run, counts = build_run(settings)
    if settings.stage == "export":
        run.restore(checkpoint.require_last(run.folder))
    else:
        train(run)
    if settings.stage != "stable" and run.accelerator.is_main_process:
        export_run(run, counts)


if __name__ == "__main__":
    sys.exit(run_program(main))
