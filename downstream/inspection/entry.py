"""An `Entry` is all that the files of a run say about one photograph; the record of the run keeps it as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from downstream.inspection.findings import Finding, finding_from
from downstream.inspection.results import Result


@dataclass(frozen=True)
class Entry:
    """The result of one photograph, and, unless it is unreadable, what else is known of it."""

    result: Result
    size: tuple[int, int] | None = None  # width and height in pixels; None if it is unreadable
    findings: tuple[Finding, ...] = ()
    odd_shape: bool = False  # it has another shape (width:height) than the normal photographs
    saturated: bool = False  # it has values above the full scale
    inspected: float = 0.0  # the share of its map that lies in the region of interest


def entry_from(entry: Mapping[str, Any]) -> Entry:
    """Read an entry back from JSON. Raises KeyError, TypeError or ValueError if it is none."""
    size = None if entry["size"] is None else (int(entry["size"][0]), int(entry["size"][1]))
    findings = tuple(map(finding_from, entry["findings"]))
    marks = bool(entry["odd_shape"]), bool(entry["saturated"])
    return Entry(result_from(entry["result"]), size, findings, *marks, float(entry["inspected"]))


def result_from(entry: Mapping[str, Any]) -> Result:
    """Read a result back from JSON. Errors as in `entry_from`."""
    numbers = ("score", "p_value", "unlike", "unlike_p_value")
    score, p_value, unlike, unlike_p_value = (None if entry[key] is None else float(entry[key]) for key in numbers)
    heatmap = None if entry["heatmap"] is None else str(entry["heatmap"])
    path, verdict, reason, measure = (str(entry[key]) for key in ("path", "verdict", "reason", "measure"))
    regions = None if entry["regions"] is None else int(entry["regions"])
    return Result(path, score, p_value, verdict, heatmap, reason, unlike, unlike_p_value, measure, regions)
