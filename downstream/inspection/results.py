"""The outcome of a scoring run: one `Result` per image, and the files scores.csv and summary.json made of
them.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adpretrain.files import atomic_path
from downstream.inspection.photos import HEATMAPS, printable

ANOMALOUS, NORMAL, UNDECIDED, UNREADABLE = "anomalous", "normal", "undecided", "unreadable"


@dataclass(frozen=True)
class Result:
    """One image. `score` and `p_value` are None where there is none."""

    path: str  # relative to the images folder, with forward slashes
    score: float | None
    p_value: float | None
    verdict: str  # anomalous, normal, undecided (there is no threshold) or unreadable
    heatmap: str | None = None  # relative to the output folder
    reason: str = ""  # why the file is unreadable


def by_score(results: Sequence[Result], verdict: str) -> list[Result]:
    """The results with this verdict, highest score first."""
    chosen = (result for result in results if result.verdict == verdict)
    return sorted(chosen, key=lambda result: (-(result.score or 0.0), result.path))


def write_scores(path: Path, results: Sequence[Result]) -> None:
    """scores.csv: path, score, p_value, verdict; an empty field where there is no number."""
    # surrogateescape writes back the very bytes of a file name that is not UTF-8, so that scripts find the
    # file.
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "score", "p_value", "verdict"])
        for result in results:
            numbers = ["" if value is None else repr(value) for value in (result.score, result.p_value)]
            writer.writerow([result.path, *numbers, result.verdict])


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def counted(results: Sequence[Result]) -> dict[str, int]:
    """How many images have each verdict."""
    counts = Counter(result.verdict for result in results)
    return {verdict: counts[verdict] for verdict in (ANOMALOUS, NORMAL, UNDECIDED, UNREADABLE)}


def as_dict(result: Result) -> dict[str, Any]:
    """For JSON: names are made valid Unicode."""
    return {**dataclasses.asdict(result), "path": printable(result.path), "reason": printable(result.reason)}


def remove_earlier_heatmaps(out: Path, lists: Sequence[str]) -> None:
    """Delete the heatmaps that an earlier run's files ``lists`` name, so that none outlives its image.

    Nothing that this toolkit did not write is touched; a list that cannot be read changes nothing.
    """
    for name in lists:
        with contextlib.suppress(OSError):
            listed = re.findall(rf'"heatmap": "({HEATMAPS}/[A-Za-z0-9._-]+\.png)"', (out / name).read_text("latin-1"))
            for heatmap in listed:
                (out / heatmap).unlink(missing_ok=True)
