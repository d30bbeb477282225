"""How fast do we train, beside TRL and the upstream recipe, on this machine?

    python benchmarks/train_speed.py                               three base shapes
    python benchmarks/train_speed.py --shapes embedded --quality   and the held-out loss after it

Every tool trains alone in a process of its own, one after the other and in turn, on the same rows
with the same hyper-parameters.  Prints one table a shape and writes outputs/bench/train_speed.md
and .json.  What is measured and how: docs/speed.md.  Keep the machine quiet meanwhile.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train_speed_compare import ShapeRun, measure_start_up
from train_speed_jobs import (
    CANDIDATES,
    EMBEDDED,
    FAMILIES,
    LORA,
    OURS,
    REPOSITORY,
    SHAPES,
    TRL,
    Candidate,
    Runner,
    all_rows,
)
from train_speed_setup import base_of, encode, peers_environment, prepare_work, say
from train_speed_table import machine, machine_line, quality_report, shape_report

from tinyllm.errors import UserError, run_program

OUTPUTS = REPOSITORY / "outputs" / "bench"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UserError: an unknown shape, or a number that makes no sense.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma separated; or none")
    parser.add_argument("--steps", type=int, help="measured steps; by default each shape's own")
    parser.add_argument("--warm_up", type=int, default=1, help="steps before that, not counted")
    parser.add_argument("--repeat", type=int, default=2, help="trainings of each tool, in turn")
    parser.add_argument(
        "--dataset", default=str(REPOSITORY / "data" / "sft_train"), help=".jsonl files or folders"
    )
    parser.add_argument(
        "--held_out", default=str(REPOSITORY / "data" / "sft_eval"), help="the same, for --quality"
    )
    parser.add_argument("--embedded", default=str(EMBEDDED), help="folder of the embedded base")
    parser.add_argument("--dropout", type=float, default=LORA["lora_dropout"])
    parser.add_argument("--try_all", action="store_true", help="bf16 even where it is slow")
    parser.add_argument("--quality", action="store_true", help="held-out loss after --epochs")
    parser.add_argument("--quality_rows", type=int, default=960)
    parser.add_argument(
        "--quality_tools", default=f"{OURS},{TRL}", help="of " + ", ".join(FAMILIES)
    )
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.error = _raise_parser_error
    arguments = parser.parse_args(argv)
    arguments.shapes = _names(arguments.shapes, list(SHAPES), "--shapes")
    arguments.quality_tools = _names(arguments.quality_tools, list(FAMILIES), "--quality_tools")
    arguments.dataset, arguments.held_out = _paths(arguments.dataset), _paths(arguments.held_out)
    arguments.embedded = Path.cwd() / arguments.embedded
    for name in ("steps", "repeat", "quality_rows", "epochs"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name} {value}: must be above 0")
    if arguments.warm_up < 0 or not 0 <= arguments.dropout < 1:
        raise UserError("--warm_up must be 0 or more, --dropout in [0, 1)")
    return arguments


def _raise_parser_error(message: str) -> None:
    raise UserError(f"{message}; see --help")


def _paths(text: str) -> list[Path]:
    return [Path.cwd() / part.strip() for part in text.split(",") if part.strip()]


def _names(text: str, allowed: list[str], option: str) -> list[str]:
    names = [] if text == "none" else [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in allowed:
            raise UserError(f"{option} {name}: expected some of {', '.join(allowed)}")
    return names


def measure_quality(arguments: argparse.Namespace, chosen: dict[str, str], runner: Runner) -> dict:
    """Train the chosen settings on the embedded shape, judge all adapters by one function."""
    base = base_of(SHAPES["embedded"], arguments.embedded, runner)
    work = prepare_work(
        base, arguments.dataset, arguments.quality_rows, arguments.dropout, runner, "quality"
    )
    held_out = replace(
        work, dataset=runner.outputs / "rows" / "held_out.jsonl",
        encoded=runner.outputs / "rows" / "held_out.json",
    )  # fmt: skip
    held_out.dataset.write_text("\n".join(all_rows(arguments.held_out)), encoding="utf-8")
    encode(held_out, runner)
    adapters, last = {"before training": None}, {}
    for candidate in _for_quality(arguments.quality_tools, chosen):
        say(f"== quality: {candidate.name}, {arguments.epochs:g} epochs ...")
        result = runner.train(candidate, work, epochs=arguments.epochs)
        adapters[candidate.name], last[candidate.name] = result["output_dir"], result["losses"][-1]
    judged = runner.project(
        "judge", base=str(base), encoded=str(held_out.encoded), adapters=adapters
    )
    return {
        "rows": arguments.quality_rows, "epochs": arguments.epochs, "base": base.name,
        "held_out_losses": judged["losses"], "last_training_losses": last,
    }  # fmt: skip


def _for_quality(families: list[str], chosen: dict[str, str]) -> list[Candidate]:
    """The settings measured before, else the first of each family."""
    first = {c.family: c for c in reversed(CANDIDATES)}
    by_name = {c.name: c for c in CANDIDATES}
    return [by_name.get(chosen.get(family, ""), first[family]) for family in families]


def report(results: dict) -> str:
    """Everything as Markdown."""
    parts = [f"Measured {machine_line(results['machine'], results['versions'])}"]
    parts += [shape_report(shape) for shape in results["shapes"]]
    if start := results["start_up"]:
        parts.append(
            f"Start-up on {start['base']}: importing torch, transformers and peft and loading the "
            f"base {start['import_and_load']:.1f} s; from the command to the first step, with the "
            f"default rows and their evaluation, {start['default_command']:.1f} s "
            f"({start['default_command'] / start['import_and_load']:.2f} x)."
        )
    if quality := results["quality"]:
        parts.append(quality_report(quality))
    return "\n\n".join(parts) + "\n"


def main() -> int:
    arguments = parse_arguments()
    shutil.rmtree(OUTPUTS / "runs", ignore_errors=True)
    results: dict = {"machine": machine(), "shapes": [], "start_up": None, "quality": None}
    runner = Runner(OUTPUTS, peers_environment(OUTPUTS))
    for name in arguments.shapes:
        run = ShapeRun(SHAPES[name], arguments, runner)
        results["shapes"].append(run.measure())
        say(shape_report(results["shapes"][-1]))
        if name == "embedded":
            results["start_up"] = measure_start_up(run.work, arguments.repeat, runner)
    if arguments.quality:
        embedded = [s["chosen"] for s in results["shapes"] if s["shape"] == "embedded"]
        results["quality"] = measure_quality(arguments, embedded[0] if embedded else {}, runner)
    results["versions"] = runner.versions
    text = report(results)
    (OUTPUTS / "train_speed.md").write_text(text, encoding="utf-8")
    content = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    (OUTPUTS / "train_speed.json").write_text(content, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
