"""Show whether runs worked.

python -m tinyllm.report RUN                 rebuild RUN/report.html from what was measured
python -m tinyllm.report RUN --measure       load base, adapter and data, and measure again
python -m tinyllm.report RUN1 RUN2 ...       compare runs: one table, their curves together
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tinyllm.errors import UserError, run_program


def main(argv: list[str] | None = None) -> int:
    """Write the report of one run, or the comparison of several."""
    args = parse_args(argv)
    from tinyllm.quiet import quiet_libraries

    quiet_libraries()
    runs = [Path(run) for run in args.runs]
    for run in runs:
        if not run.is_dir():
            raise UserError(f"{run}: no such run folder")
    metrics = [report(run, args) for run in runs]
    if len(runs) > 1:
        compare(runs, metrics, args)
    return 0


def report(run: Path, args: argparse.Namespace) -> dict:
    """Write one run's report, measuring where that was asked for or never done."""
    from tinyllm import run_folder
    from tinyllm.base import read_json
    from tinyllm.model_card import model_card
    from tinyllm.report import files, plots
    from tinyllm.report.texts import verdict_line
    from tinyllm.report.write import write_report

    if args.measure or not (run / files.METRICS).is_file():
        from tinyllm.report.again import measure_again

        evidence = measure_again(run, args.base_model, args.probe_prompts)
    else:
        evidence = files.load_metrics(run)["evidence"]
    saved = read_json(run / "run.json")
    lang = args.lang or saved.get("settings", {}).get("lang", "zh")
    metrics = write_report(run, evidence, lang)
    (run / run_folder.MODEL_CARD).write_text(model_card(saved, metrics), encoding="utf-8")
    if not plots.can_draw():
        print(f"note: {plots.MISSING}", file=sys.stderr)
    print(f"{run / files.PAGE}\n{verdict_line(metrics['verdict'], lang)}")
    return metrics


def compare(runs: list[Path], metrics: list[dict], args: argparse.Namespace) -> None:
    """Write the comparison, and print its table."""
    from tinyllm.report.compare import comparison_page, comparison_text, names_of

    lang, names, target = args.lang or "zh", names_of(runs), Path(args.output)
    try:
        target.write_text(comparison_page(metrics, names, lang), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {target}: cannot be written: {error.strerror}") from error
    print(f"\n{comparison_text(metrics, names, lang)}\n{target}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tinyllm.report", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--lang", choices=["zh", "en"], help="language (default: the run's own)")
    parser.add_argument("--measure", action="store_true", help="measure again")
    parser.add_argument("--base_model", "--base_model_path", help="base folder, if it has moved")
    parser.add_argument("--probe_prompts", help="file with your own questions, one a line")
    parser.add_argument(
        "--output", default="comparison.html", help="page that compares (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.probe_prompts:
        from tinyllm.report.settings import read_prompts

        read_prompts(args.probe_prompts)
        args.measure = True
    return args


if __name__ == "__main__":
    sys.exit(run_program(main))
