"""The outcome of a scoring run: one `Result` per image, and scores.csv."""

from __future__ import annotations

import csv
import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adpretrain.files import atomic_path
from downstream.inspection.photos import printable

ANOMALOUS, NORMAL, UNDECIDED, UNREADABLE = "anomalous", "normal", "undecided", "unreadable"
COLUMNS = ("path", "score", "p_value", "verdict", "unlike", "unlike_p_value", "measure", "reason")


@dataclass(frozen=True)
class Result:
    """One image. Numbers are None where there are none."""

    path: str  # relative to the images folder, with forward slashes
    score: float | None
    p_value: float | None
    verdict: str  # anomalous, normal, undecided (no threshold, or compared with itself) or unreadable
    heatmap: str | None = None  # relative to the output folder
    reason: str = ""  # why it is anomalous (what is beyond its threshold), undecided or unreadable
    unlike: float | None = None  # how much it is unlike the normals as a whole, see downstream.appearance
    unlike_p_value: float | None = None
    measure: str = ""  # in what it is unlike them most

    @property
    def judgement(self) -> str:
        """The verdict and, in brackets, the reason: "anomalous (score)"."""
        return f"{self.verdict} ({self.reason})" if self.reason else self.verdict


def write_scores(path: Path, results: Sequence[Result]) -> None:
    """scores.csv, a row per result in `COLUMNS`; an empty field where there is no number."""
    # surrogateescape writes back the very bytes of a file name that is not UTF-8, so that scripts find the file.
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for result in results:
            values = [getattr(result, name) for name in COLUMNS]
            writer.writerow("" if value is None else value for value in values)


def counted(results: Sequence[Result]) -> dict[str, int]:
    """How many images have each verdict."""
    counts = Counter(result.verdict for result in results)
    return {verdict: counts[verdict] for verdict in (ANOMALOUS, NORMAL, UNDECIDED, UNREADABLE)}


def as_dict(result: Result) -> dict[str, Any]:
    """For JSON: names are made valid Unicode."""
    return {**dataclasses.asdict(result), "path": printable(result.path), "reason": printable(result.reason)}
