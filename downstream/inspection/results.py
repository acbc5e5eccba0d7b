"""The results of a scoring run: one `Result` per image, and scores.csv."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from downstream.inspection import PLAIN, Tables
from downstream.inspection.photos import printable
from downstream.inspection.spreadsheet import write_table

ANOMALOUS, NORMAL, UNDECIDED, UNREADABLE = "anomalous", "normal", "undecided", "unreadable"
VERDICTS = (ANOMALOUS, NORMAL, UNDECIDED, UNREADABLE)
COLUMNS = ("path", "score", "p_value", "verdict", "unlike", "unlike_p_value", "measure", "reason", "regions")


@dataclass(frozen=True)
class Result:
    """The result of one image. A number that could not be computed is None."""

    path: str  # relative to the images folder, with forward slashes
    score: float | None
    p_value: float | None
    verdict: str  # anomalous, normal, undecided (no threshold, or compared with itself) or unreadable
    heatmap: str | None = None  # relative to the output folder
    reason: str = ""  # why the image is anomalous (what exceeds its threshold), undecided or unreadable
    unlike: float | None = None  # how far the image as a whole is from the normals, see downstream.appearance
    unlike_p_value: float | None = None
    measure: str = ""  # the measure (such as brightness) in which it is farthest from them
    regions: int | None = None  # number of regions of its map above the pixel limit

    @property
    def is_quiet(self) -> bool:
        """Whether it is normal although it has regions above the pixel limit."""
        return self.verdict == NORMAL and bool(self.regions)

    @property
    def judgement(self) -> str:
        """The verdict with the reason in brackets, such as "anomalous (score)"."""
        return f"{self.verdict} ({self.reason})" if self.reason else self.verdict

    @property
    def title(self) -> str:
        """The line above the picture of a scored image: its name, judgement and numbers."""
        p_value = "" if self.p_value is None else f", p {self.p_value:.3g}"
        return f"{printable(self.path)}: {self.judgement}, score {self.score:.4g}{p_value}"


def write_scores(path: Path, results: Sequence[Result], tables: Tables = PLAIN) -> None:
    """Write scores.csv, one row per result with `COLUMNS`; None becomes an empty field."""
    write_table(path, (COLUMNS, results), tables)


def counted(results: Sequence[Result]) -> dict[str, int]:
    """Count the images with each verdict."""
    counts = Counter(result.verdict for result in results)
    return {verdict: counts[verdict] for verdict in VERDICTS}


def oddness(result: Result) -> tuple[float, float]:
    """Sort the most unusual photographs first, be it by score or as a whole."""
    p_values = [value for value in (result.p_value, result.unlike_p_value) if value is not None]
    return min(p_values, default=1.0), -(result.score or 0.0)


def as_dict(result: Result) -> dict[str, Any]:
    """Turn a result into a dict for JSON, with path and reason as valid Unicode."""
    return {**dataclasses.asdict(result), "path": printable(result.path), "reason": printable(result.reason)}
