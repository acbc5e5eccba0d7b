"""The content of summary.json, which marks a complete run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from adpretrain import __version__
from downstream.inspection.inspector import Inspector
from downstream.inspection.photos import printable
from downstream.inspection.picture_names import HEATMAPS, LISTING, MASKS
from downstream.inspection.results import as_dict
from downstream.inspection.tally import Tally


def summary_of(inspector: Inspector, tally: Tally, warnings: Sequence[str]) -> dict[str, Any]:
    """What a program wants to know of a run. "images" are the photographs that ``tally`` lists, "images_left_out" the
    number of the others."""
    calibration, options = inspector.calibration, inspector.options
    promised = calibration if options.threshold is None else None
    return {
        "references": inspector.references,
        "reference_choice": options.references if inspector.references else None,
        "shots": options.shots if inspector.references else None,
        "threshold": inspector.threshold,
        "unlike_threshold": _finite(calibration.unlike_threshold) if calibration else None,
        "threshold_from": "user" if options.threshold is not None else "calibration" if calibration else None,
        "asked_false_alarm_rate": options.false_alarm_rate,
        "promised_false_alarm_rate": promised.rate if promised else None,
        "false_alarm_rate_upper_95": promised.rate_upper if promised else None,
        "calibration_scores": list(calibration.scores) if calibration else [],
        "calibration_unlike": list(calibration.unlike) if calibration else [],
        "pixel_limit": inspector.pixel_limit,
        "pixels_per_cell": [round(side, 2) for side in inspector.cell],
        "regions": tally.regions,
        "images_with_regions": tally.with_regions,
        "region_of_interest": None if options.roi is None else printable(options.roi),
        "ignored_border": options.ignore_border,
        "inspected_share": None if tally.inspected is None else round(tally.inspected, 4),
        "full_scale": inspector.reader.full_scale,
        "counts": tally.counts,
        "warnings": [printable(warning) for warning in warnings],
        "files": {
            "scores": "scores.csv",
            "report": "report.html",
            "heatmaps": HEATMAPS,
            "regions": "regions.csv",
            "coco": "regions.json",
            "masks": MASKS,
            **({"heatmaps_listing": LISTING} if tally.left_out else {}),
        },
        "images": [as_dict(entry.result) for entry in tally.listed],
        "images_left_out": tally.left_out,
        "library_version": __version__,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
