"""The pieces that the report's pages are made of: numbers, tables, the page around them.

Every number carries the place in ``metrics.json`` that it comes from (``data-metric``), so that a
page can be checked against it.
"""

from __future__ import annotations

from html import escape

STYLE = """
:root{--back:#fff;--fore:#1d2330;--soft:#5c6675;--line:#d9dee6;--box:#f5f7fa;--c0:#2563c9;--c1:#c2410c;
--c2:#15803d;--c3:#7e3fb5;--c4:#b5307a;--c5:#0e7490;--good:#15803d;--bad:#b42318;--warn:#a15c07}
@media (prefers-color-scheme:dark){:root{--back:#14171d;--fore:#e6e9ef;--soft:#9aa5b5;--line:#323a46;
--box:#1d222b;--c0:#7fb0ff;--c1:#ff9d66;--c2:#6fd08c;--c3:#c79bf2;--c4:#f29bc9;--c5:#67d3e8;
--good:#6fd08c;--bad:#ff8b80;--warn:#f2c063}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:1rem;background:var(--back);color:var(--fore);
font:16px/1.6 system-ui,"PingFang SC","Microsoft YaHei","Noto Sans CJK SC",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.3}h2{font-size:1.15rem;margin:2rem 0 .5rem;border-bottom:1px solid var(--line)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600}td.n{text-align:right;white-space:nowrap}
.verdict{padding:.8rem 1rem;border-left:.4rem solid var(--warn);background:var(--box);border-radius:.3rem}
.verdict.learned{border-color:var(--good)}.verdict.not_at_all,.verdict.overfitted{border-color:var(--bad)}
.verdict strong{display:block;font-size:1.25rem}.verdict ul{margin:.3rem 0 0;padding-left:1.2rem}
.soft{color:var(--soft);font-size:.9rem}
.reply{border:1px solid var(--line);border-radius:.3rem;padding:.6rem .8rem;margin:.6rem 0}
.reply p{margin:.2rem 0;white-space:pre-wrap}.pair{display:grid;grid-template-columns:1fr 1fr;gap:.8rem}
@media (max-width:36rem){.pair{grid-template-columns:1fr}body{padding:.6rem;font-size:15px}
th,td{padding:.3rem .35rem}}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:11px}
svg .grid{stroke:var(--line)}svg polyline{fill:none;stroke-width:2;stroke-linejoin:round}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;padding:0;margin:.2rem 0;font-size:.9rem}
.legend li::before{content:"";display:inline-block;width:1.2em;height:.25em;margin-right:.4em;
vertical-align:middle;background:currentColor}
pre{background:var(--box);padding:.6rem;overflow-x:auto;font-size:.85rem;white-space:pre-wrap}
""" + "".join(
    f"g.c{i} polyline{{stroke:var(--c{i})}}g.c{i} circle{{fill:var(--c{i})}}li.c{i}{{color:var(--c{i})}}"
    for i in range(6)
)


def whole_page(title: str, lang: str, body: str) -> str:
    """A self-contained HTML file: no script, no font, no picture from elsewhere."""
    language = "zh-CN" if lang == "zh" else "en"
    return (
        f'<!doctype html>\n<html lang="{language}"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def look_up(metrics, path: str):
    """The value at ``a.b.0.c``; None where any part is missing."""
    value = metrics
    for name in path.split("."):
        if isinstance(value, list):
            value = value[int(name)] if int(name) < len(value) else None
        else:
            value = value.get(name) if isinstance(value, dict) else None
        if value is None:
            return None
    return value


def shown(value, kind: str = "number") -> str:
    """A number as the page writes it: ``number``, ``share``, ``mib`` or ``plain``."""
    if value is None:
        return "–"
    if kind == "share":
        return f"{value:.1%}"
    if kind == "mib":
        return f"{value / 2**20:,.0f} MiB"
    if isinstance(value, float) and kind == "number":
        return f"{value:.4f}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def number(metrics, path: str, kind: str = "number") -> str:
    """A number that says where in the metrics it stands."""
    return (
        f'<span data-metric="{escape(path)}" data-kind="{kind}">'
        f"{shown(look_up(metrics, path), kind)}</span>"
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table from cells that are HTML already; cells after the first are aligned as numbers."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=n' if i else ''}>{cell}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def section(title: str, content: str) -> str:
    """A heading and what stands below it; nothing where there is nothing."""
    return f"<h2>{escape(title)}</h2>{content}" if content else ""
