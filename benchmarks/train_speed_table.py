"""Measurements → tables, as text that is also Markdown."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}  # relative
NONE = "–"


@dataclass
class Measured:
    """One tool on one shape: what its trainings have shown.

    Attributes:
        examples_per_second: median over the repeats.
        slowest, fastest: of the repeats, examples/s.
        before_mib: resident memory before step 1: libraries, base, rows.
        peak_mib: most resident memory until the end of the last step.
        share: of the machine's GEMM limit in the tool's precision.
        first_loss: of step 1, where the adapter changes nothing yet: the same for every tool.
        last_loss: of the last step; None when the tool took fewer steps than ours.
    """

    family: str
    settings: str
    precision: str
    examples_per_second: float
    slowest: float
    fastest: float
    supervised_per_second: float
    before_mib: float
    peak_mib: float
    share: float
    first_loss: float
    last_loss: float | None
    start_up: float


def seconds_per_step(result: dict, warm_up: int) -> float:
    """Mean seconds of the steps after the warm-up."""
    steps = result["step_seconds"][warm_up:] or result["step_seconds"]
    return sum(steps) / len(steps)


def summarise(
    candidate, results: list[dict], warm_up: int, rows_per_step: int, supervised_per_row: float,
    flops: float, gflops: float, all_steps: int,
) -> Measured:  # fmt: skip
    """Medians over the repeats of one tool.

    Args:
        flops: of one step.
        gflops: the machine's limit in this precision, GFLOP/s.
        all_steps: steps of a whole training; a shorter one has no last loss to compare.
    """
    rates = [rows_per_step / seconds_per_step(result, warm_up) for result in results]
    rate, last = median(rates), results[-1]["losses"]
    return Measured(
        candidate.family, candidate.settings, candidate.precision, rate, min(rates), max(rates),
        rate * supervised_per_row, median(r["before_mib"] for r in results),
        median(r["peak_mib"] for r in results),
        flops * rate / rows_per_step / (gflops * 1e9), last[0],
        last[-1] if len(last) == all_steps else None, median(r["start_up"] for r in results),
    )  # fmt: skip


def is_correct(loss: float, reference: float, precision: str) -> bool:
    """Whether a loss at step 1 is the reference's, as far as the precision allows."""
    return abs(loss - reference) <= TOLERANCE[precision] * abs(reference)


def shape_report(shape: dict) -> str:
    """One shape: what was done, the table, and what else there is to say."""
    limits = ", ".join(
        f"{name} {limit['own']:.0f} (1024 x 1024: {limit['large']:.0f})"
        for name, limit in shape["limit_gflops"].items()
    )
    notes = "".join(f"\n- {note}" for note in shape["notes"])
    return (
        f"### {shape['shape']}\n\nBase {shape['base']}; rows of {shape['tokens_per_row']:.0f} tokens, "
        f"{shape['supervised_per_row']:.0f} of them supervised, 16 rows a step; {shape['steps']} "
        f"steps measured after {shape['warm_up']}, median of {shape['repeat']}; LoRA dropout "
        f"{shape['dropout']:g}. GEMM limit on this shape's matrices, GFLOP/s: {limits}.\n\n"
        + table([Measured(**row) for row in shape["rows"]])
        + f"\n{notes}"
    )


def quality_report(quality: dict, against: str = "TRL") -> str:
    """Held-out losses of the adapters, by one function."""
    losses = quality["held_out_losses"]
    base = next((loss for name, loss in losses.items() if name.startswith(f"{against}:")), None)
    last = quality["last_training_losses"]
    cells = [
        [
            name, f"{loss:.4f}", f"{100 * (loss / base - 1):+.2f} %" if base else NONE,
            f"{last[name]:.4f}" if name in last else NONE,
        ]
        for name, loss in losses.items()
    ]  # fmt: skip
    head = ["tool", "held-out loss per token", f"to {against}", "loss, last step"]
    return (
        f"### Quality\n\n{quality['epochs']:g} epochs over {quality['rows']} rows on "
        f"{quality['base']}, every adapter judged by the same function, in float32.\n\n"
        + markdown(head, cells, left=1)
    )


def table(rows: list[Measured], against: str = "TRL") -> str:
    """One shape as a Markdown table; ratios are to the tool named ``against``."""
    base = next((row for row in rows if row.family == against), None)
    head = [
        "tool", "settings", "examples/s", "range", f"x {against}", "supervised tokens/s",
        "peak MiB", f"x {against}", "before step 1", "share of GEMM limit", "loss, step 1",
        "loss, last step", "start-up s",
    ]  # fmt: skip
    cells = [
        [
            row.family, row.settings, f"{row.examples_per_second:.2f}",
            f"{row.slowest:.2f}–{row.fastest:.2f}",
            _ratio(row.examples_per_second, base and base.examples_per_second),
            f"{row.supervised_per_second:.0f}", f"{row.peak_mib:.0f}",
            _ratio(row.peak_mib, base and base.peak_mib), f"{row.before_mib:.0f}",
            f"{100 * row.share:.0f} %", f"{row.first_loss:.4f}",
            NONE if row.last_loss is None else f"{row.last_loss:.4f}",
            f"{row.start_up:.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    return markdown(head, cells)


def markdown(head: list[str], cells: list[list[str]], left: int = 2) -> str:
    """A Markdown table with aligned columns, the first ``left`` of them to the left."""
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    lines = [
        "| " + " | ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ) + " |"
        for line in [head, *cells]
    ]  # fmt: skip
    rule = ["-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths)]
    lines.insert(1, f"|{'|'.join(rule)}|")
    return "\n".join(lines)


def _ratio(value: float, base: float | None) -> str:
    return f"{value / base:.2f}" if base else NONE


def machine() -> dict:
    """What was measured on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(), "cores": cores, "os": platform.platform(terse=True),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"), "date": date.today().isoformat(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }  # fmt: skip


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    by_name = {name.strip(): value.strip() for name, value in fields.items()}
    flags = set(by_name.get("flags", "").split())
    wide = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{by_name.get('model name', platform.machine())} ({', '.join(wide) or 'no AVX2'})"


def machine_line(about: dict, versions: dict) -> str:
    """Machine, versions and date in one paragraph."""
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    load = about["load_before"]
    busy = f"; load before {load:.1f}" if load is not None else ""
    return (
        f"{about['date']}: {about['cpu']}, {about['cores']} cores, {about['os']}, "
        f"OMP_NUM_THREADS {about['threads']}{busy}. {named}."
    )
