"""Curves as inline SVG that follows the page's colours."""

from __future__ import annotations

import math
from html import escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 30

Curve = list[list[float]]  # [step, value] pairs


def chart(curves: dict[str, Curve], step_word: str) -> str:
    """Curves over the steps in one drawing, with axes and a legend; '' when there is no point.

    Points that are no finite number are left out.
    """
    curves = {name: _finite(points) for name, points in curves.items()}
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    x_low, x_high = _range([step for step, _ in points])
    y_low, y_high = _range([value for _, value in points])

    def x(step: float) -> float:
        return LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (y_high - value) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [_grid(x, y, (x_low, x_high), (y_low, y_high), step_word)]
    for number, (name, curve) in enumerate(curves.items()):
        if curve:
            parts.append(_line([(x(step), y(value)) for step, value in curve], number % 6, name))
    drawing = "".join(parts)
    legend = "".join(
        f'<li class="c{number % 6}">{escape(name)}</li>'
        for number, name in enumerate(curves)
        if curves[name]
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{drawing}</svg>'
        f'<ul class="legend">{legend}</ul>'
    )


def _finite(points: Curve) -> Curve:
    return [[step, value] for step, value in points if math.isfinite(value)]


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _grid(x, y, steps: tuple[float, float], values: tuple[float, float], step_word: str) -> str:
    parts = []
    for i in range(5):
        value = values[0] + (values[1] - values[0]) * i / 4
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" '
            f'y2="{y(value):.1f}"/><text x="{LEFT - 6}" y="{y(value) + 4:.1f}" '
            f'text-anchor="end">{value:.3g}</text>'
        )
    for i in range(5):
        step = steps[0] + (steps[1] - steps[0]) * i / 4
        parts.append(
            f'<text x="{x(step):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{step:.0f}</text>'
        )
    parts.append(
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - BOTTOM - 4}" text-anchor="end">'
        f"{escape(step_word)}</text>"
    )
    return "".join(parts)


def _line(points: list[tuple[float, float]], colour: int, name: str) -> str:
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
    dots = ""
    if len(points) <= 40:
        dots = "".join(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.5"/>' for px, py in points)
    return (
        f'<g class="c{colour}"><title>{escape(name)}</title><polyline points="{path}"/>{dots}</g>'
    )
