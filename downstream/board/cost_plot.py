"""The plot of cost against quality as SVG: milliseconds to score a photograph, image AUROC; nobody is better and faster
than the points on the line.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from downstream.board.tasks import Line

WIDTH, HEIGHT = 780, 380
LEFT, RIGHT, TOP, BOTTOM = 52, 204, 14, 44
# Colours of Okabe and Ito, which colour-blind readers can tell apart, on light and on dark ground.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a")
STYLE = (
    "<style>svg{font:12px system-ui,sans-serif;fill:#16191f;color:#16191f}"
    "@media (prefers-color-scheme:dark){svg{fill:#e8eaee;color:#e8eaee}}</style>"
)

Place = Callable[[float], float]  # a value -> its place on the drawing


class Point(NamedTuple):
    """A pair of features and detector: what it costs in milliseconds, and its image AUROC in per cent."""

    milliseconds: float
    quality: float
    features: str
    detector: str


def points_of(lines: Sequence[Line]) -> list[Point]:
    """The ranked lines whose time was measured."""
    found = []
    for line in lines:
        cost, quality = line.milliseconds, line.mean("image_auroc")
        if line.standing is not None and cost and quality is not None:
            found.append(Point(cost, quality, line.features, line.detector or ""))
    return found


def front(points: Sequence[Point]) -> list[Point]:
    """The points of which none is both faster and better, from the fastest to the best."""
    out: list[Point] = []
    for point in sorted(points, key=lambda point: (point.milliseconds, -point.quality)):
        if not out or point.quality > out[-1].quality:
            out.append(point)
    return out


def cost_plot(lines: Sequence[Line], alone: bool = False) -> str:
    """Draw the plot; ``alone``: with its own style, for a file beside Markdown. Empty for fewer than two points."""
    points = points_of(lines)
    if len(points) < 2:
        return ""
    costs, qualities = [point.milliseconds for point in points], [point.quality for point in points]
    low, high = math.log10(min(costs)) - 0.05, math.log10(max(costs)) + 0.05
    bottom, top = max(0.0, min(qualities) - 1), min(100.5, max(qualities) + 1)

    def x(milliseconds: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(milliseconds) - low) / (high - low)

    def y(quality: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (quality - bottom) / (top - bottom)

    detectors = list(dict.fromkeys(sorted(point.detector for point in points)))
    colour = {name: COLOURS[min(number, len(COLOURS) - 1)] for number, name in enumerate(detectors)}
    best = front(points)
    parts = [_axes(10**low, 10**high, bottom, top, x, y)]
    path = " ".join(f"{x(one.milliseconds):.1f},{y(one.quality):.1f}" for one in best)
    parts.append(f'<polyline points="{path}" fill="none" stroke="currentColor" stroke-dasharray="3 3" opacity=".6"/>')
    for point in points:
        told = html.escape(f"{point.features}, {point.detector}: {point.quality:.1f} %, {point.milliseconds:.0f} ms")
        centre = f'cx="{x(point.milliseconds):.1f}" cy="{y(point.quality):.1f}"'
        parts.append(
            f'<circle {centre} r="{5 if point in best else 4}" fill="{colour[point.detector]}" '
            f'fill-opacity="{1 if point in best else 0.7}"><title>{told}</title></circle>'
        )
    parts += _legend(detectors, colour)
    drawn = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" fill="currentColor">'
    title = "<title>Milliseconds to score a photograph against image AUROC</title>"
    return "".join([drawn, STYLE if alone else "", title, *parts, "</svg>\n"])


def _legend(detectors: Sequence[str], colour: dict[str, str]) -> list[str]:
    out = []
    for number, name in enumerate(detectors):
        height = TOP + 14 + 20 * number
        out.append(f'<circle cx="{WIDTH - RIGHT + 18}" cy="{height - 4}" r="5" fill="{colour[name]}"/>')
        out.append(f'<text x="{WIDTH - RIGHT + 30}" y="{height}">{html.escape(name)}</text>')
    height = TOP + 14 + 20 * len(detectors)
    out.append(f'<text x="{WIDTH - RIGHT + 10}" y="{height}" opacity=".75">- - nothing is faster and better</text>')
    return out


def _axes(least: float, most: float, bottom: float, top: float, x: Place, y: Place) -> str:
    """Lines and numbers of both axes."""
    parts = []
    step = next(step for step in (0.5, 1, 2, 5, 10, 20, 50) if (top - bottom) / step <= 8)
    value = math.ceil(bottom / step) * step
    while value <= min(top, 100):
        height = y(value)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}" stroke="currentColor" '
            f'opacity=".15"/><text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
        value += step
    floor = HEIGHT - BOTTOM
    for power in range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1):
        for factor in (1, 2, 5) if most / least > 8 else (1, 1.5, 2, 3, 4, 5, 7):
            tick = factor * 10.0**power
            if least <= tick <= most:
                parts.append(
                    f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{floor}" stroke="currentColor" '
                    f'opacity=".15"/><text x="{x(tick):.1f}" y="{floor + 18}" text-anchor="middle">{tick:g}</text>'
                )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">ms to score a photograph (log scale)</text>'
    )
    parts.append(
        f'<text x="14" y="{(TOP + floor) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {(TOP + floor) / 2})">image AUROC, %</text>'
    )
    return "".join(parts)
