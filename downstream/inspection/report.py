"""One self-contained HTML page about a scoring run: no server, no network, readable from a memory stick.

The pictures of the highest scores are inlined as small JPEGs, cut out of the saved heatmaps, until a budget is spent;
the others are links to the heatmap files beside the page. Everything that comes from file names or messages is escaped,
and the page forbids itself any other source of pictures, scripts or styles (Content-Security-Policy).
"""

from __future__ import annotations

import base64
import contextlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from itertools import chain
from pathlib import Path
from urllib.parse import quote

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

from adpretrain.files import atomic_path
from downstream.calibration import percent
from downstream.inspection.finding import printable
from downstream.inspection.results import ANOMALOUS, NORMAL, UNDECIDED, UNREADABLE, Result
from downstream.visualise import COLORMAP, photo_and_heatmap

THUMBNAIL = 320  # longest side in pixels
BUDGET = 32 * 2**20  # bytes of inlined JPEG; base64 makes a third more of it
BINS = 40


@dataclass(frozen=True)
class Fact:
    """One tile of the summary: its name, its value and a line of explanation."""

    name: str
    value: str
    note: str = ""


def write_report(
    path: Path,
    results: Sequence[Result],
    title: str,
    where: str,
    facts: Sequence[Fact],
    warnings: Sequence[str] = (),
    threshold: float | None = None,
    normal_scores: Sequence[float] = (),
    footer: str = "",
    budget: int = BUDGET,
) -> None:
    """Write the page; the results' heatmaps lie beside it. All texts are plain text and are escaped here.

    `normal_scores` are marked in the histogram. The pictures of the highest scores are inlined until about `budget`
    bytes are spent, so that neither the page nor its making outgrows the memory, however many results there are.
    """
    counts = Counter(result.verdict for result in results)
    pictures = _inlined(path.parent, results, budget)
    linked = sum(result.heatmap is not None for result in results) - len(pictures)
    if linked:
        footer += f" The {len(pictures)} highest scores have their pictures in this page, {linked} others beside it."
    values: dict[str, Iterable[str]] = {
        "title": [escape(printable(title))],
        "tone": ["" if counts[ANOMALOUS] or not counts[NORMAL] else "clean"],
        "headline": [_headline(counts, threshold)],
        "where": [escape(printable(where))],
        "facts": map(tile, facts),
        "warnings": [warning_list(warnings)],
        "histogram": [_histogram(results, threshold, normal_scores)],
        "filters": [_filters(counts)],
        "cards": (_card(result, pictures.get(result.path)) for result in results),
        "ramp": [",".join(to_hex(colormaps[COLORMAP](at)) for at in np.linspace(0, 1, 9))],
        "footer": [escape(printable(footer))],
    }
    template = resources.files("downstream").joinpath("report.html").read_text(encoding="utf-8")
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as page:
        # Only the template is searched for placeholders: a file name that looks like one is never filled in.
        for number, part in enumerate(re.split(r"\{\{(\w+)\}\}", template)):
            page.writelines(values[part] if number % 2 else [part])


def _inlined(folder: Path, results: Sequence[Result], budget: int) -> dict[str, tuple[bytes, bytes]]:
    """Small JPEGs of photograph and heatmap, the highest scores first, until the budget is spent."""
    pictures: dict[str, tuple[bytes, bytes]] = {}
    for result in sorted(results, key=lambda result: -(result.score or 0.0)):
        if budget <= 0 or result.heatmap is None:
            break
        with contextlib.suppress(OSError), Image.open(folder / result.heatmap) as saved:  # taken away: a dead link
            photo, heat = map(jpeg, photo_and_heatmap(saved))
            pictures[result.path] = photo, heat
            budget -= len(photo) + len(heat)
    return pictures


def _pictures(result: Result, inlined: tuple[bytes, bytes] | None) -> str:
    if result.heatmap is None:
        return f'<div class="look none">{escape(printable(result.reason))}</div>'
    alt = escape(printable(result.path))
    images = ""
    for kind, content in zip(("photo", "heat"), inlined or (), strict=False):
        source = "data:image/jpeg;base64," + base64.b64encode(content).decode("ascii")
        images += f'<img class="{kind}" src="{source}" alt="{alt}, {kind}" decoding="async">'
    if not inlined:  # the linked panel shows photograph and heatmap side by side
        images = f'<img src="{_link(result.heatmap)}" alt="{alt}" loading="lazy" decoding="async">'
    return f'<button class="look" aria-label="Enlarge {alt}">{images}</button>'


def jpeg(picture: Image.Image) -> bytes:
    """A small JPEG, for inlining."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=82)
    return buffer.getvalue()


def _link(relative: str) -> str:
    return escape(quote(relative), quote=True)


def _card(result: Result, inlined: tuple[bytes, bytes] | None) -> str:
    name = escape(printable(result.path), quote=True)
    score = "" if result.score is None else repr(result.score)
    p_value = "" if result.p_value is None else repr(result.p_value)
    numbers = f'<span class="badge">{escape(result.verdict)}</span>'
    numbers += "" if result.score is None else f"<span>score {result.score:.4g}</span>"
    numbers += "" if result.p_value is None else f"<span>p {result.p_value:.3g}</span>"
    if result.unlike is not None:
        p_unlike = "" if result.unlike_p_value is None else f", p {result.unlike_p_value:.3g}"
        numbers += f"<span>unlike {result.unlike:.3g} ({escape(result.measure)}{p_unlike})</span>"
    if result.reason and result.heatmap is not None:  # otherwise it stands in the picture's place
        numbers += f'<span class="why">{escape(printable(result.reason))}</span>'
    full = f' data-full="{_link(result.heatmap)}"' if result.heatmap else ""
    data = f'data-name="{name}" data-score="{score}" data-p="{p_value}" data-verdict="{result.verdict}"{full}'
    text = f'<span class="name">{name}</span><span class="numbers">{numbers}</span>'
    return f'<li {data}>{_pictures(result, inlined)}<div class="say">{text}</div></li>\n'


def _headline(counts: Counter[str], threshold: float | None) -> str:
    scored = counts[ANOMALOUS] + counts[NORMAL] + counts[UNDECIDED]
    if threshold is None:
        text = f"{scored} {_images(scored)} ranked, without a threshold"
    elif counts[ANOMALOUS]:
        text = f"<b>{counts[ANOMALOUS]} of {scored}</b> {_images(scored)} {_are(counts[ANOMALOUS])} anomalous"
    elif counts[NORMAL]:
        text = f"<b>No anomaly</b> in {scored} {_images(scored)}"
    else:
        text = "No image could be scored"
    if threshold is not None and counts[UNDECIDED]:
        text += f", {counts[UNDECIDED]} undecided"
    return text + (f", {counts[UNREADABLE]} unreadable" if counts[UNREADABLE] else "")


def _images(count: int) -> str:
    return "image" if count == 1 else "images"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def tile(fact: Fact) -> str:
    """HTML of one tile of the summary."""
    note = f"<small>{escape(printable(fact.note))}</small>" if fact.note else ""
    return f"<div><dt>{escape(fact.name)}</dt><dd>{escape(printable(fact.value))}{note}</dd></div>"


def warning_list(warnings: Sequence[str]) -> str:
    """HTML of the warnings, empty without any."""
    items = "".join(f"<li>{escape(printable(warning))}</li>" for warning in warnings)
    return f'<ul class="warnings" aria-label="Warnings">{items}</ul>' if items else ""


def _filters(counts: Counter[str]) -> str:
    buttons = [("all", f"All {counts.total()}")]
    buttons += [
        (verdict, f"{verdict.capitalize()} {counts[verdict]}")
        for verdict in (ANOMALOUS, NORMAL, UNDECIDED, UNREADABLE)
        if counts[verdict]
    ]
    return "".join(f'<button data-filter="{value}" aria-pressed="false">{text}</button>' for value, text in buttons)


def _histogram(results: Sequence[Result], threshold: float | None, normal_scores: Sequence[float]) -> str:
    """Stacked bars of the scores by verdict, the threshold, and a tick for each normal photograph."""
    scores = {verdict: _scores(results, verdict) for verdict in (NORMAL, UNDECIDED, ANOMALOUS)}
    if not any(scores.values()):
        return ""
    everything = [*chain.from_iterable(scores.values()), *normal_scores]
    everything += [] if threshold is None else [threshold]
    low, high = min(everything), max(everything)
    room = 0.02 * (high - low) or max(abs(low), 1.0) * 0.05
    low, high = low - room, high + room
    bars, tallest = _bars(scores, threshold, low, high)
    limit = ""
    if threshold is not None:
        at = 100 * (threshold - low) / (high - low)
        side = " left" if at > 60 else ""  # the label stays inside the plot
        text = f"<span>threshold {threshold:.4g}</span>"
        limit = f'<div class="limit{side}" style="left:{at:.2f}%">{text}</div>'
    rug = "".join(f'<i style="left:{100 * (score - low) / (high - low):.2f}%"></i>' for score in normal_scores[:500])
    return (
        '<section class="panel"><h2>Scores</h2><div class="plot">'
        f'<svg class="bars" viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" '
        f'aria-label="Histogram of scores from {low:.3g} to {high:.3g}">{bars}</svg>{limit}'
        f'<div class="rug">{rug}</div><div class="axis"><span>{low:.3g}</span>'
        f"<span>tallest bar: {tallest}</span><span>{high:.3g}</span></div></div>"
        f"{_key(scores, bool(normal_scores))}</section>"
    )


def _scores(results: Sequence[Result], verdict: str) -> list[float]:
    return [result.score for result in results if result.verdict == verdict and result.score is not None]


def _bars(scores: dict[str, list[float]], threshold: float | None, low: float, high: float) -> tuple[str, int]:
    """SVG rectangles in a 1000 x 100 box, and the number of images in the tallest bar."""
    edges = np.linspace(low, high, BINS + 1)
    if threshold is not None:  # a bin edge, so that no bar lies on both sides of it
        edges = np.unique(np.append(edges[np.abs(edges - threshold) > (high - low) / BINS / 2], threshold))
    heights = {verdict: np.histogram(values, edges)[0] for verdict, values in scores.items()}
    tallest = max(1, int(np.sum(list(heights.values()), axis=0).max()))
    bars, below = [], np.zeros(len(edges) - 1)
    for verdict, counts in heights.items():
        for index in np.flatnonzero(counts):
            left, right, count = edges[index], edges[index + 1], counts[index]
            x, width = 1000 * (left - low) / (high - low), 1000 * (right - left) / (high - low)
            y, height = 100 * (1 - (below[index] + count) / tallest), 100 * count / tallest
            wide = max(width - 1.6, 0.5)  # a hairline between neighbours
            bars.append(
                f'<rect class="b-{verdict}" x="{x + 0.8:.2f}" y="{y:.2f}" width="{wide:.2f}" '
                f'height="{height:.2f}"><title>{count} {verdict}, {left:.3g} to {right:.3g}</title></rect>'
            )
        below += counts
    return "".join(bars), tallest


def _key(scores: dict[str, list[float]], calibrated: bool) -> str:
    colours = {NORMAL: "--good-bar", UNDECIDED: "--soft", ANOMALOUS: "--bad"}
    items = [
        f'<i style="background:var({colours[verdict]})"></i>{verdict} ({len(values)})'
        for verdict, values in scores.items()
        if values
    ]
    if calibrated:
        items.append('<i class="line" style="background:var(--accent)"></i>normal photographs, calibration')
        items.append("p: share of the normal photographs, and the image itself, that score at least as high")
    items.append('<span class="ramp"></span>heatmap: typical normal, the limit (middle, outlined), beyond')
    return f'<ul class="key">{"".join(f"<li>{item}</li>" for item in items)}</ul>'


def rate_fact(rate: float | None, asked: float, upper: float | None) -> Fact:
    """The false-alarm tile."""
    if rate is None or upper is None:
        return Fact("False-alarm rate", "not known", "no calibrated threshold")
    note = f"on average; for these photographs up to {percent(upper)} (95 % confidence)"
    return Fact(
        "Promised false-alarm rate",
        percent(rate),
        note if rate <= asked + 1e-9 else f"{percent(asked)} was asked; {note}",
    )
