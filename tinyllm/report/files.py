"""A run folder → everything the report shows, as ``metrics.json`` keeps it."""

from __future__ import annotations

from pathlib import Path

from tinyllm import run_folder
from tinyllm.base import read_json
from tinyllm.errors import UserError
from tinyllm.json_lines import read_lines
from tinyllm.report.verdict import judge

METRICS = "metrics.json"
PAGE = "report.html"
PLOT = "training_loss.png"
FORMAT = 1
CURVES = ("loss", "eval_loss", "learning_rate", "grad_norm")


def build_metrics(folder: Path, evidence: dict, run: dict | None = None) -> dict:
    """Content of ``metrics.json``, from the evidence and the other files of a run folder.

    Args:
        run: content of ``run.json`` where the folder's own is not final yet.

    Raises:
        UserError: a file that every run leaves is missing or damaged.
    """
    run = run or read_json(folder / run_folder.RUN_FILE)
    if "results" not in run:
        raise UserError(f"{folder}: the run is not finished, so there is nothing to report yet")
    curves = read_curves(folder)
    training = training_numbers(run, curves)
    return {
        "format": FORMAT,
        "name": folder.resolve().name,
        "verdict": judge(evidence, training).to_json(),
        "evidence": evidence,
        "training": training,
        "curves": curves,
        "data": run.get("data", {}),
        "ledger": ledger_lines(folder),
        "settings": run["settings"],
        "identity": run["identity"],
        "versions": run.get("versions", {}),
        "plan": run["results"].get("plan"),
        "lineage": read_lineage(folder),
        "merge_certificate": optional_json(folder / run_folder.CERTIFICATE),
    }


def read_curves(folder: Path) -> dict[str, list[list[float]]]:
    """``[step, value]`` pairs of what was logged, by name."""
    history = read_json(folder / "trainer_state.json").get("log_history", [])
    curves: dict[str, list[list[float]]] = {name: [] for name in CURVES}
    for entry in history:
        for name in CURVES:
            if name in entry:
                curves[name].append([entry["step"], float(entry[name])])
    return curves


def training_numbers(run: dict, curves: dict) -> dict:
    """Steps, losses, speed and memory of the training."""
    results, settings = run["results"], run["settings"]
    evaluated = [value for step, value in curves["eval_loss"] if step > 0]
    seconds, data = results.get("train_runtime"), run.get("data", {})
    tokens = data.get("num_tokens", 0) * (results.get("epoch") or 0)
    examples = data.get("num_examples", 0) * (results.get("epoch") or 0)
    return {
        "num_steps": results["num_steps"],
        "epochs": results.get("epoch"),
        "learning_rate": float(settings["learning_rate"]),
        "train_loss": results.get("train_loss"),
        "eval_loss_before": results.get("eval_loss_before"),
        "eval_loss": results.get("eval_loss"),
        "best_eval_loss": min(evaluated, default=None),
        "seconds": seconds,
        "tokens_per_second": _rate(tokens, seconds),
        "examples_per_second": _rate(examples, seconds),
        "peak_memory_bytes": results.get("peak_memory_bytes"),
        "parameters": results.get("parameters"),
        "device": results.get("device"),
    }


def _rate(amount: float, seconds: float | None) -> float | None:
    return amount / seconds if amount and seconds else None


def ledger_lines(folder: Path) -> list[dict]:
    """One line a data file: what was read, kept, refused, dropped, shortened, repeated."""
    report = optional_json(folder / run_folder.DATA_REPORT) or {}
    names = ("file", "part", "num_read", "num_kept", "num_refused", "num_dropped",
             "num_shortened", "num_duplicates", "num_held_out")  # fmt: skip
    return [{name: file.get(name) for name in names} for file in report.get("files", [])]


def read_lineage(folder: Path) -> list[dict]:
    """When the training was started, and after which step, each time."""
    return read_lines(folder / run_folder.LINEAGE)


def optional_json(path: Path) -> dict | None:
    """Content of a file that a run may have; None where it has not.

    Raises:
        UserError: it is there and damaged.
    """
    return read_json(path) if path.is_file() else None


def load_metrics(folder: Path) -> dict:
    """``metrics.json`` of a run.

    Raises:
        UserError: the folder has none, or one of another format.
    """
    metrics = read_json(folder / METRICS)
    if metrics.get("format") != FORMAT or "evidence" not in metrics:
        raise UserError(
            f"{folder / METRICS}: another format than this program's; measure again with --measure"
        )
    return metrics
