"""Metrics → ``report.html``: one self-contained file."""

from __future__ import annotations

import json
from html import escape

from tinyllm.report.html import number, section, table, whole_page
from tinyllm.report.svg import chart
from tinyllm.report.texts import LEVELS, PAGE, reason_text

SIDE_ROWS = (("loss", "number"), ("perplexity", "number"), ("token_accuracy", "share"),
             ("stop_probability", "share"))  # fmt: skip
TRAINING_ROWS = (
    ("num_steps", "plain"), ("epochs", "plain"), ("learning_rate", "plain"), ("train_loss", "number"),
    ("eval_loss_before", "number"), ("eval_loss", "number"), ("best_eval_loss", "number"),
    ("seconds", "plain"), ("tokens_per_second", "plain"), ("examples_per_second", "plain"),
    ("peak_memory_bytes", "mib"), ("parameters", "plain"), ("device", "plain"),
)  # fmt: skip
LEDGER_COLUMNS = ("part", "num_read", "num_kept", "num_refused", "num_dropped", "num_shortened",
                  "num_duplicates", "num_held_out")  # fmt: skip


def report_page(metrics: dict, lang: str) -> str:
    """The report of one run."""
    words = PAGE[lang]
    title = f"{words['title']}: {metrics['name']}"
    body = (
        f"<h1>{escape(title)}</h1>"
        + verdict_box(metrics["verdict"], lang)
        + section(words["evidence"], evidence(metrics, words))
        + section(words["replies"], replies(metrics, words))
        + section(words["curves"], curves(metrics, words))
        + section(words["training"], training(metrics, words))
        + section(words["data"], ledger(metrics, words))
        + section(words["lineage"], lineage(metrics, words))
        + section(words["certificate"], listing(metrics["merge_certificate"]))
        + section(words["settings"], settings(metrics, words))
        + section(words["versions"], listing(metrics["versions"]))
    )
    return whole_page(title, lang, body)


def verdict_box(verdict: dict, lang: str) -> str:
    """The verdict in one line, and its reasons."""
    reasons = "".join(f"<li>{escape(reason_text(r, lang))}</li>" for r in verdict["reasons"])
    return (
        f'<div class="verdict {verdict["level"]}"><strong>{escape(LEVELS[lang][verdict["level"]])}'
        f"</strong><ul>{reasons}</ul></div>"
    )


def evidence(metrics: dict, words: dict) -> str:
    """Everything that was measured off and on, one line each."""
    found, rows = metrics["evidence"], []

    def both(label: str, path: str, kind: str, drop: str = "") -> None:
        interval = _interval(metrics, drop) if drop else ""
        sides = [number(metrics, f"evidence.{path.format(side)}", kind) for side in ("off", "on")]
        rows.append([escape(label), *sides, interval])

    if found["held_out"]:
        for name, kind in SIDE_ROWS:
            both(f"{words['held_out']}: {words[name]}", f"held_out.{{}}.{name}", kind,
                 "evidence.held_out.drop" if name == "loss" else "")  # fmt: skip
    if found["stop"]["replies"]:
        both(words["stop_share"], "stop.{}", "share")
    if found["question"]:
        both(words["question"], "question.{}.mean", "number")
    for name in ("general", "train"):
        if found[name]:
            both(words[name], f"{name}.{{}}.loss", "number", f"evidence.{name}.drop")
    head = [words["what"], words["off"], words["on"], f"{words['drop']} ({words['interval']})"]
    note = f'<p class="soft">{escape(_sampled(found, words))}{escape(words["note"])}</p>'
    return table(head, rows) + note


def _interval(metrics: dict, path: str) -> str:
    mean, low, high = (number(metrics, f"{path}.{name}") for name in ("mean", "low", "high"))
    return f"{mean}<br>({low} … {high})"


def _sampled(found: dict, words: dict) -> str:
    if not found["held_out"]:
        return ""
    text = words["rows_measured"].format(
        rows=found["held_out"]["rows"], total=found["num_held_out"],
        tokens=found["held_out"]["tokens"],
    )  # fmt: skip
    return f"{words['held_out']}: {text}. "


def replies(metrics: dict, words: dict) -> str:
    """The replies of both sides, the user's own questions first."""
    found = sorted(metrics["evidence"]["replies"], key=lambda reply: reply["source"] != "user")
    held_out = metrics["evidence"]["num_held_out"] > 0
    return "".join(_reply(reply, words, held_out) for reply in found)


def _reply(reply: dict, words: dict, held_out: bool) -> str:
    source = words["own"]
    if reply["source"] == "data":
        source = words["from_data"] if held_out else words["from_train"]
    gold = ""
    if reply["gold"] is not None:
        gold = f'<p class="soft">{escape(words["gold"])}: {escape(reply["gold"])}</p>'
    sides = ""
    for side in ("off", "on"):
        end = "" if reply[side]["stopped"] else f' <span class="soft">{words["unfinished"]}</span>'
        sides += (
            f'<div><span class="soft">{escape(words[side])}</span>'
            f"<p>{escape(reply[side]['text'])}{end}</p></div>"
        )
    return (
        f'<div class="reply"><p><span class="soft">{escape(source)}</span> '
        f'<b>{escape(reply["question"])}</b></p>{gold}<div class="pair">{sides}</div></div>'
    )


def curves(metrics: dict, words: dict) -> str:
    """Losses in one drawing, the learning rate in another."""
    found = metrics["curves"]
    losses = {words[f"curve_{name}"]: found[name] for name in ("loss", "eval_loss")}
    rate = {words["curve_learning_rate"]: found["learning_rate"]}
    return chart(losses, words["step"]) + chart(rate, words["step"])


def training(metrics: dict, words: dict) -> str:
    """Steps, speed and memory; beside them what the plan had said."""
    rows = [
        [escape(words[name]), number(metrics, f"training.{name}", kind)]
        for name, kind in TRAINING_ROWS
    ]
    if metrics["plan"]:
        rows.append([words["planned_seconds"], number(metrics, "plan.seconds", "plain")])
        rows.append([words["planned_memory"], number(metrics, "plan.memory.total", "mib")])
    rows.append([words["report_seconds"], number(metrics, "evidence.seconds", "plain")])
    return table([words["what"], words["value"]], rows)


def ledger(metrics: dict, words: dict) -> str:
    """What became of the rows of each file."""
    if not metrics["ledger"]:
        return ""
    rows = []
    for place, line in enumerate(metrics["ledger"]):
        part = words["train_part"] if line["part"] == "train" else words["held_out_part"]
        cells = [number(metrics, f"ledger.{place}.{name}", "plain") for name in LEDGER_COLUMNS[1:]]
        rows.append([escape(line["file"]), escape(part), *cells])
    return table([words["file"], *(words[name] for name in LEDGER_COLUMNS)], rows)


def lineage(metrics: dict, words: dict) -> str:
    """Where the run was interrupted and taken up again."""
    found = metrics["lineage"]
    if len(found) < 2:
        return f"<p>{escape(words['no_lineage'])}</p>"
    rows = [
        [escape(one["started"]), number(metrics, f"lineage.{place}.after_step", "plain")]
        for place, one in enumerate(found)
    ]
    return table([words["started"], words["after_step"]], rows)


def settings(metrics: dict, words: dict) -> str:
    """Every setting of the run, folded away."""
    return f"<details><summary>{words['expand']}</summary>{listing(metrics['settings'])}</details>"


def listing(content: dict | None) -> str:
    """Names and values as they are."""
    if not content:
        return ""
    lines = [
        f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for name, value in sorted(content.items())
    ]
    return f"<pre>{escape(chr(10).join(lines))}</pre>"
