"""Several runs → one page: a table with a line each, and their curves in one drawing."""

from __future__ import annotations

from collections import Counter
from html import escape
from pathlib import Path

from tinyllm.report.html import look_up, number, section, shown, table, whole_page
from tinyllm.report.svg import chart
from tinyllm.report.texts import LEVELS, PAGE

COLUMNS = (
    ("held_out", "evidence.held_out.off.loss", "number", "off"),
    ("held_out", "evidence.held_out.on.loss", "number", "on"),
    ("drop", "evidence.held_out.drop.mean", "number", None),
    ("stop_probability", "evidence.held_out.on.stop_probability", "share", None),
    ("general", "evidence.general.on.loss", "number", "on"),
    ("num_steps", "training.num_steps", "plain", None),
    ("learning_rate", "training.learning_rate", "plain", None),
    ("parameters", "training.parameters", "plain", None),
    ("seconds", "training.seconds", "plain", None),
    ("peak_memory_bytes", "training.peak_memory_bytes", "mib", None),
)  # fmt: skip


def names_of(folders: list[Path]) -> list[str]:
    """The folders' names, with as much of the path as tells them apart."""
    names = [folder.resolve().name for folder in folders]
    repeated = {name for name, number in Counter(names).items() if number > 1}
    return [
        str(folder) if name in repeated else name
        for folder, name in zip(folders, names, strict=True)
    ]


def heads(lang: str) -> list[str]:
    """The columns' names."""
    words = PAGE[lang]
    named = [words[name] + (f" ({words[side]})" if side else "") for name, _, _, side in COLUMNS]
    return [words["run"], words["verdict"], *named]


def comparison_page(runs: list[dict], names: list[str], lang: str) -> str:
    """The comparison as a self-contained HTML file."""
    words = PAGE[lang]
    rows = [
        [escape(name), LEVELS[lang][run["verdict"]["level"]],
         *(number(runs, f"{place}.{path}", kind) for _, path, kind, _ in COLUMNS)]
        for place, (name, run) in enumerate(zip(names, runs, strict=True))
    ]  # fmt: skip
    drawings = ""
    for curve in ("loss", "eval_loss", "learning_rate"):
        lines = {name: run["curves"][curve] for name, run in zip(names, runs, strict=True)}
        drawings += section(words[f"curve_{curve}"], chart(lines, words["step"]))
    body = f"<h1>{words['compare']}</h1>{table(heads(lang), rows)}{drawings}"
    body += _differences(runs, names, words)
    return whole_page(words["compare"], lang, body)


def _differences(runs: list[dict], names: list[str], words: dict) -> str:
    """The settings in which the runs differ."""
    keys = sorted({key for run in runs for key in run["settings"]})
    rows = []
    for key in keys:
        values = [str(run["settings"].get(key, "–")) for run in runs]
        if len(set(values)) > 1:
            rows.append([escape(key), *(escape(value) for value in values)])
    return section(words["settings"], table([words["what"], *names], rows)) if rows else ""


def comparison_text(runs: list[dict], names: list[str], lang: str) -> str:
    """The same table for a terminal, a run a block."""
    blocks = []
    for name, run in zip(names, runs, strict=True):
        values = [shown(look_up(run, path), kind) for _, path, kind, _ in COLUMNS]
        verdict = LEVELS[lang][run["verdict"]["level"]]
        lines = [f"  {head}: {value}" for head, value in zip(heads(lang)[2:], values, strict=True)]
        blocks.append("\n".join([f"{name}: {verdict}", *lines]))
    return "\n".join(blocks)
