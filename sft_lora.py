"""Supervised fine-tuning of a small language model with LoRA.

    ./script/sft_lora.sh                       the usual way: sets up, launches, says how to chat
    python sft_lora.py --dataset my.jsonl      this program alone, on one device
    python sft_lora.py --config my.yaml --learning_rate 2e-4
    python sft_lora.py --dataset my.jsonl --preview 3       look at examples, train nothing

Every setting: python sft_lora.py --help
"""

from __future__ import annotations

import sys

from tinyllm.errors import run_program


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; returns the exit code."""
    from tinyllm.imports import without_collections
    from tinyllm.launcher_watch import watch_launcher
    from tinyllm.quiet import quiet_libraries

    watch_launcher()
    with without_collections():
        quiet_libraries()
        from tinyllm import sft
        from tinyllm.command_line import parse_settings

    # 1. settings: default < YAML < command line
    settings, notes = parse_settings(sys.argv[1:] if argv is None else argv)
    sft.say_once(notes + sft.check_start(settings))
    # 2. base model and tokenizer
    model, tokenizer, chat_format = sft.load_model(settings)
    # 3. rows → examples
    data, max_length = sft.load_examples(settings, model, chat_format)
    if settings.run.preview:
        sft.show_preview(settings, tokenizer, data)
        return 0
    if settings.run.verify_resume:
        return sft.verify_resume(settings, data, max_length)
    # 4. LoRA around the base
    model = sft.prepare_model(settings, model)
    if settings.run.dry_run:
        sft.dry_run(settings, model, tokenizer, data, max_length)
        return 0
    # 5. what this run is, and what the run folder already holds
    with sft.open_run(settings, tokenizer, data) as run:
        if run.already_finished:
            return 0
        # 6. train, evaluating on the held-out rows
        trainer = sft.build_trainer(settings, model, tokenizer, data, max_length)
        plan = sft.print_plan(settings, trainer, data)
        results = sft.train(trainer, run) | {"plan": plan}
        # 7. the run folder: adapter, tokenizer, results, model card
        sft.finish(settings, trainer, run, data, results)
    # 8. what came out
    sft.show_samples(settings, trainer, chat_format, data)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
