"""Curves, histograms and scatter plots of an evaluation, as PNG bytes, without a window or global state.

The colour of a line shows the detector, its style the features: dotted for raw, dashed for residual, dash-dotted for
scaled, and solid for pretrained and any other name.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from downstream.evaluation.measured import CURVE
from downstream.metric_counts import count, roc_curve

# Colours of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LINES = {"raw": ":", "residual": "--", "scaled": "-.", "pretrained": "-"}
NORMAL, ANOMALOUS = "#7fb0a8", "#c0301c"
INK, SOFT = "#16191f", "#596270"
RATES = np.linspace(0, 1, 201)  # false positive rates at which ROC curves are averaged

Record = Mapping[str, Any]


def curves(records: Sequence[Record]) -> bytes:
    """Plot image ROC and per-region overlap of every contender, averaged over products."""
    figure, (roc, pro) = _figure(9.2, 3.7, columns=2)
    for style, group in _by_contender(records):
        found = [_roc(record) for record in group]
        defined = [values for values in found if values is not None]
        if defined:
            roc.plot(RATES, np.mean(defined, 0), **style)
        regions = [record["pro"] for record in group if record["pro"] is not None]
        if regions:
            pro.plot(CURVE, np.mean(regions, 0), **style)
    _axes(roc, "Images: ROC", "share of normal images called defective", "share of defects found")
    roc.plot([0, 1], [0, 1], color=SOFT, linewidth=0.6)
    _axes(pro, "Pixels: overlap with defect regions", "share of normal pixels called defective", "mean region overlap")
    pro.set_xlim(0, float(CURVE[-1]))
    handles, labels = roc.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    return png(figure)


def histograms(records: Sequence[Record]) -> bytes:
    """Plot histograms of one product's image scores, one per contender, in per cent of normal or defective images."""
    records = [record for record in records if record["scores"]]
    columns = max(1, min(3, len(records)))
    rows = max(1, -(-len(records) // columns))
    figure, grid = _figure(3.1 * columns, 1.75 * rows + 0.3, columns, rows)
    for axes, record in zip(grid, records, strict=False):
        scores, labels = np.array(record["scores"]), np.array(record["labels"], dtype=bool)
        edges = np.histogram_bin_edges(scores, bins=24)
        kinds = [("normal", scores[~labels], NORMAL), ("defective", scores[labels], ANOMALOUS)]
        for name, values, colour in kinds:
            shares = np.full(len(values), 100 / max(1, len(values)))
            label = f"{name} ({len(values)})"
            # One histogram is filled and the other outlined, so that both are visible where they overlap.
            filled = {"color": colour} if name == "normal" else {"edgecolor": colour, "linewidth": 1.4, "fill": False}
            axes.hist(values, edges, weights=shares, histtype="stepfilled", label=label, **filled)
        axes.set_title(f"{record['detector']}, {record['features']}", fontsize=9, color=INK, loc="left")
        axes.tick_params(labelsize=7, colors=SOFT)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_formatter("{x:.0f} %")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(records) :]:
        axes.set_axis_off()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return png(figure)


def scatter(points: Mapping[str, NDArray[np.floating]], anomalous: NDArray[np.bool_], method: str) -> bytes:
    """Plot features in two dimensions, one plot per title: ``points`` maps it to [n, 2], for the same n patches."""
    figure, grid = _figure(4.2 * len(points), 4.0, len(points))
    for axes, (title, place_N2) in zip(grid, points.items(), strict=True):
        for name, chosen, colour in (("normal", ~anomalous, NORMAL), ("defective", anomalous, ANOMALOUS)):
            axes.scatter(*place_N2[chosen].T, s=9, color=colour, alpha=0.8, linewidths=0, label=f"{name} patches")
        axes.set_title(f"{title} ({method})", fontsize=10, color=INK, loc="left")
        axes.set_xticks([])
        axes.set_yticks([])
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return png(figure)


def png(figure: Figure) -> bytes:
    """Return a figure as PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _figure(width: float, height: float, columns: int, rows: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return figure, np.ravel(figure.subplots(rows, columns, squeeze=False))


def _by_contender(records: Sequence[Record]) -> list[tuple[dict[str, Any], list[Record]]]:
    """Return line style and records of every contender."""
    detectors = list(dict.fromkeys(record["detector"] for record in records))
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["detector"], record["features"]), []).append(record)
    return [
        (
            {
                "color": COLOURS[detectors.index(detector) % len(COLOURS)],
                "linestyle": LINES.get(features, "-"),
                "linewidth": 1.6,
                "label": f"{detector}, {features}",
            },
            group,
        )
        for (detector, features), group in groups.items()
    ]


def _roc(record: Record) -> NDArray[np.float64] | None:
    """Return the share of defective images found at each of `RATES`; None if all images are normal or all defective."""
    labels = np.array(record["labels"], dtype=bool)
    if labels.all() or not labels.any():  # also without any image
        return None
    rate, found = roc_curve(count(np.array(record["scores"], dtype=np.float64), labels))
    # np.interp would turn a vertical step into a slope, so we start from the last corner at or before each rate.
    rate, found = np.append(rate, 2.0), np.append(found, found[-1])
    left = np.searchsorted(rate, RATES, side="right") - 1
    width = np.maximum(rate[left + 1] - rate[left], 1e-12)
    return found[left] + np.minimum((RATES - rate[left]) / width, 1) * (found[left + 1] - found[left])


def _axes(axes: Axes, title: str, horizontal: str, vertical: str) -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(horizontal, fontsize=8, color=SOFT)
    axes.set_ylabel(vertical, fontsize=8, color=SOFT)
    axes.tick_params(labelsize=8, colors=SOFT)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.grid(color="#e6e9ee", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
