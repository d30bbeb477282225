"""``training_loss.png``: the losses as a picture, drawn with matplotlib where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

MISSING = (
    "training_loss.png is not drawn: matplotlib is missing (pip install -r requirement-report.txt); "
    "report.html has the same curves"
)


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_losses(curves: dict, path: Path) -> None:
    """Draw the training and the held-out loss over the steps, without touching a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "held-out", "o-")):
        if curves[name]:
            steps, values = zip(*curves[name], strict=True)
            axes.plot(steps, values, style, label=label, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, format="png")
