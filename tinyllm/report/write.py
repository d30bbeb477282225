"""Evidence → the report's files in a run folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from tinyllm import run_folder
from tinyllm.report import files, plots
from tinyllm.report.page import report_page


def write_report(folder: Path, evidence: dict, lang: str) -> dict:
    """Write ``metrics.json``, ``report.html`` and (with matplotlib) ``training_loss.png``.

    The files appear together, or (after an error) not at all.

    Returns:
        The metrics.

    Raises:
        UserError: the folder holds no finished training, or cannot be read.
    """
    metrics = files.build_metrics(folder, evidence)
    scratch = folder / ".reporting"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        run_folder.write_json(scratch / files.METRICS, metrics)
        (scratch / files.PAGE).write_text(report_page(metrics, lang), encoding="utf-8")
        if plots.can_draw():
            plots.draw_losses(metrics["curves"], scratch / files.PLOT)
        run_folder.publish(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return metrics
