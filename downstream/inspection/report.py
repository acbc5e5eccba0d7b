"""The report of a scoring run: one self-contained HTML page that needs no server and no network.

The pictures of the highest scores are inlined as small JPEGs, cut out of the saved heatmaps, until a budget is spent;
the others are links to the heatmap files beside the page. The template escapes everything that comes from file names
or messages, and a Content-Security-Policy forbids any other source of pictures, scripts or styles.
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from numpy.typing import ArrayLike
from PIL import Image

from adpretrain.files import atomic_path
from downstream.calibration import percent
from downstream.inspection.photos import printable
from downstream.inspection.results import ANOMALOUS, NORMAL, UNDECIDED, Result
from downstream.inspection.tally import Tally
from downstream.visualise import COLORMAP, MOST_BOXES, photo_and_heatmap

THUMBNAIL = 320  # longest side in pixels
BUDGET = 32 * 2**20  # bytes of inlined JPEG, which base64 makes a third larger
BINS = 40
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("downstream", ""),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
TEMPLATES.filters |= {
    "base64": lambda content: base64.b64encode(content).decode("ascii"),
    "percent": percent,
    "text": lambda value: "" if value is None else repr(value),
}


@dataclass(frozen=True)
class Fact:
    """One tile of the summary: its name, its value and a line of explanation."""

    name: str
    value: str
    note: str = ""


def write_report(
    path: Path,
    tally: Tally,
    title: str,
    where: str,
    facts: Sequence[Fact],
    warnings: Sequence[str] = (),
    threshold: float | None = None,
    normal_scores: Sequence[float] = (),
    evidence: str = "",
    footer: str = "",
    budget: int = BUDGET,
    in_brief: str = "",
) -> None:
    """Write the page to `path`, beside the heatmaps and scores.csv. All texts are plain text and are escaped here.

    `in_brief` says in a few sentences what was found. The cards show the photographs that `tally` lists, with their
    regions; the histogram counts all. `normal_scores` are marked in it. `evidence` is the plot of a `Watch`, an SVG
    that is put in as it is. The pictures of the highest scores are inlined until about `budget` bytes are used, so that
    the page fits into memory, however many photographs there are.
    """
    counts, results = tally.counts, [entry.result for entry in tally.listed]
    pictures = _inlined(path.parent, results, budget)
    linked = sum(result.heatmap is not None for result in results) - len(pictures)
    if linked:
        footer += f" The {len(pictures)} highest scores have their pictures in this page, {linked} others beside it."
    parts = TEMPLATES.get_template("report.html").generate(
        title=title,
        where=where,
        facts=facts,
        warnings=warnings,
        threshold=threshold,
        counts=counts,
        scored=counts[ANOMALOUS] + counts[NORMAL] + counts[UNDECIDED],
        plot=_histogram(tally.scores, threshold, normal_scores),
        evidence=evidence,
        results=results,
        total=len(tally),
        left_out=tally.left_out,
        in_brief=in_brief,
        regions={entry.result.path: entry.findings for entry in tally.listed},
        most_regions=MOST_BOXES,
        pictures=pictures,
        ramp=",".join(to_hex(colormaps[COLORMAP](at)) for at in np.linspace(0, 1, 9)),
        footer=footer,
    )
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as page:
        page.writelines(map(printable, parts))


def _inlined(folder: Path, results: Sequence[Result], budget: int) -> dict[str, list[bytes]]:
    """Return small JPEGs of photograph and heatmap, highest scores first, until the budget is spent."""
    pictures: dict[str, list[bytes]] = {}
    for result in sorted(results, key=lambda result: -(result.score or 0.0)):
        if budget <= 0 or result.heatmap is None:
            break
        with contextlib.suppress(OSError), Image.open(folder / result.heatmap) as saved:  # a missing file stays a link
            pictures[result.path] = [jpeg(picture) for picture in photo_and_heatmap(saved)]
            budget -= sum(map(len, pictures[result.path]))
    return pictures


def jpeg(picture: Image.Image) -> bytes:
    """Shrink a picture to a small JPEG for inlining."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=82)
    return buffer.getvalue()


def _histogram(
    scores: Mapping[str, ArrayLike], threshold: float | None, normal_scores: Sequence[float]
) -> dict[str, Any] | None:
    """Lay out stacked bars of the scores by verdict in a box of 1000 x 100, and the positions of the threshold and the
    normal scores in per cent. None if there are no scores."""
    if not any(map(np.size, scores.values())):
        return None
    marked = [*normal_scores, *([] if threshold is None else [threshold])]
    everything = [np.asarray(values) for values in (*scores.values(), marked) if np.size(values)]
    low, high = float(min(map(np.min, everything))), float(max(map(np.max, everything)))
    room = 0.02 * (high - low) or max(abs(low), 1.0) * 0.05
    low, high = low - room, high + room

    def place(value: float) -> float:
        return 100 * (value - low) / (high - low)

    edges = np.linspace(low, high, BINS + 1)
    if threshold is not None:  # make it a bin edge, so that no bar spans it
        edges = np.unique(np.append(edges[np.abs(edges - threshold) > (high - low) / BINS / 2], threshold))
    heights = {verdict: np.histogram(values, edges)[0] for verdict, values in scores.items()}
    tallest = max(1, int(np.sum(list(heights.values()), axis=0).max()))
    bars, below = [], np.zeros(len(edges) - 1)
    for verdict, counts in heights.items():
        for index in np.flatnonzero(counts):
            left, right, count = edges[index], edges[index + 1], counts[index]
            wide = max(10 * (place(right) - place(left)) - 1.6, 0.5)  # leave a hairline between bars
            bars.append(
                {
                    "verdict": verdict,
                    "x": f"{10 * place(left) + 0.8:.2f}",
                    "y": f"{100 * (1 - (below[index] + count) / tallest):.2f}",
                    "width": f"{wide:.2f}",
                    "height": f"{100 * count / tallest:.2f}",
                    "title": f"{count} {verdict}, {left:.3g} to {right:.3g}",
                }
            )
        below += counts
    return {
        "bars": bars,
        "tallest": tallest,
        "low": f"{low:.3g}",
        "high": f"{high:.3g}",
        "limit": None if threshold is None else place(threshold),
        "rug": [f"{place(score):.2f}" for score in normal_scores[:500]],
    }
