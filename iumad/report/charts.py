"""Charts as inline SVG that follows the page's colours (light and dark)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 960, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 34


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]], marks: Mapping[float, str], x_title: str
) -> str:
    """Lines over a logarithmic vertical axis.

    Args:
        series: name -> points (x, y); non-positive values of y are left out.
        marks: x -> text: where a new step begins.
        x_title: what x counts.
    """
    points = [(x, y) for line in series.values() for x, y in line if y > 0]
    if not points:
        return ""
    x_low, x_high = 0.0, max(x for x, _ in points)
    low = math.floor(math.log10(min(y for _, y in points)) * 2) / 2
    high = max(math.ceil(math.log10(max(y for _, y in points)) * 2) / 2, low + 0.5)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / max(x_high - x_low, 1e-9)
        up = (math.log10(y) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    for exponent in range(math.ceil(low), math.floor(high) + 1):
        _, y = at(x_low, 10.0**exponent)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{10.0**exponent:g}</text>'
        )
    for value, text in marks.items():
        x, _ = at(value, 10.0**low)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{x + 4:.1f}" y="{TOP + 10}">{escape(text)}</text>')
    for value in np.linspace(x_low, x_high, 6):
        x, _ = at(float(value), 10.0**low)
        where = f'x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}"'
        parts.append(f'<text class="tick" {where} text-anchor="middle">{value:.0f}</text>')
    for index, (name, line) in enumerate(series.items()):
        path = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in line if y > 0)
        parts.append(
            f'<polyline class="line c{index}" points="{path}"><title>{escape(name)}</title></polyline>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="tick" x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_title)}</text>'
    )
    return _svg(WIDTH, HEIGHT, parts)


def legend(names: Sequence[str]) -> str:
    """The key of :func:`curves`."""
    keys = (
        f'<span class="key"><i class="c{index}"></i>{escape(name)}</span>' for index, name in enumerate(names)
    )
    return f'<div class="legend">{"".join(keys)}</div>'


def histogram(good: Sequence[float], defect: Sequence[float], threshold: float | None) -> str:
    """Scores of normal and defective images on one axis, with the threshold as a dashed line."""
    width, height, base = 300, 112, 92
    everything = [*good, *defect, *([threshold] if threshold is not None else [])]
    if not everything:
        return ""
    low, high = min(everything), max(everything)
    margin = 0.04 * max(high - low, 1e-9)
    edges = np.linspace(low - margin, high + margin, 25)
    counts = [np.histogram(scores, edges)[0] for scores in (good, defect)]
    top = max(1, *(int(count.max()) for count in counts))
    step = (width - 8) / (len(edges) - 1)
    parts = []
    for kind, count in zip(("good", "defect"), counts, strict=True):
        for index, number in enumerate(count):
            if number:
                tall = (base - 10) * number / top
                where = f'x="{4 + index * step:.1f}" y="{base - tall:.1f}"'
                where += f' width="{step - 1:.1f}" height="{tall:.1f}"'
                parts.append(f'<rect class="{kind}" {where}><title>{number} {kind}</title></rect>')
    parts.append(f'<line class="axis" x1="4" x2="{width - 4}" y1="{base}" y2="{base}"/>')
    for x, anchor, value in ((4, "start", edges[0]), (width - 4, "end", edges[-1])):
        parts.append(f'<text class="tick" x="{x}" y="{base + 14}" text-anchor="{anchor}">{value:.3g}</text>')
    if threshold is not None:
        x = 4 + (threshold - edges[0]) / (edges[-1] - edges[0]) * (width - 8)
        parts.append(f'<line class="threshold" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{base}"/>')
    return _svg(width, height, parts)


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'
