"""Inspect a new product with a few normal photographs: references, threshold, scores, heatmaps, report, export."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from downstream.tiles import Tiling

WHOLE = Tiling()
References = Literal["even", "random", "kmeans", "aligned"]


@dataclass(frozen=True)
class Options:
    """Options for scoring photographs. Raises ValueError for values out of range.

    Args:
        false_alarm_rate: share of normal images that may be called anomalous
        threshold: use this score as the threshold instead of a calibrated one; no false-alarm rate is then promised
        references: how references are chosen among the normal photographs: evenly spaced by name, drawn at random,
            spread over k-means clusters, or for every image those best aligned with it (for parts that shift or turn)
        shots: use at most this many normal photographs as references; the others calibrate the threshold
        seed: random seed of --references random and kmeans
        batch_size: number of images per batch
        tiling: whether and how photographs are cut into tiles
        roi: mask of what is inspected, white on black, the size of the photographs; or a folder with a mask for each
            photograph, of its name. Outside nothing is scored, matched or calibrated
        ignore_border: number of pixels along the edges of a photograph that are not inspected
        least_area: smallest region to report, in pixels of the photograph; the limit above which map values count is
            lower for larger regions. 0 reports every region
        maps: write the map of every photograph to maps/*.tif, as 32-bit floats
        mm_per_pixel: side of a pixel on the product in millimetres, so that areas are given in square millimetres too
    """

    false_alarm_rate: float = 0.05
    threshold: float | None = None
    references: References = "even"
    shots: int = 16
    seed: int = 0
    batch_size: int = 16
    tiling: Tiling = WHOLE
    roi: str | None = None
    ignore_border: int = 0
    least_area: float = 0.0
    mm_per_pixel: float | None = None
    maps: bool = False

    def __post_init__(self) -> None:
        if self.false_alarm_rate == 0:
            raise ValueError(
                "false-alarm rate 0 cannot be promised by any number of photographs: n normal ones promise 1 in n + 1 "
                "at best, so 19 promise 5 %, 99 promise 1 % and 999 promise 0.1 %; give such a rate"
            )
        if not 0 < self.false_alarm_rate < 1:
            raise ValueError(f"false-alarm rate {self.false_alarm_rate}; expected a share between 0 and 1, e.g. 0.05")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"threshold {self.threshold}; expected a finite number")
        if self.references not in get_args(References):
            raise ValueError(f"references {self.references!r}; choose one of {', '.join(get_args(References))}")
        if self.tiling.tile and self.references in ("kmeans", "aligned"):
            raise ValueError(
                f"--references {self.references} looks at whole photographs: choose even or random with --tile"
            )
        if self.ignore_border < 0:
            raise ValueError(f"border of {self.ignore_border} pixels; expected 0 or more")
        if not 0 <= self.least_area < math.inf:
            raise ValueError(f"least area {self.least_area}; expected a number of pixels, 0 or more")
        if self.mm_per_pixel is not None and not 0 < self.mm_per_pixel < math.inf:
            raise ValueError(f"{self.mm_per_pixel} mm per pixel; expected a length above 0, such as 0.05")
        if self.shots < 1 or self.batch_size < 1:
            raise ValueError(f"shots {self.shots} and batch_size {self.batch_size}: expected at least 1")


DEFAULTS = Options()


@dataclass(frozen=True)
class Tables:
    """How tables are written. Raises ValueError for a separator that cannot be told from what it separates.

    Args:
        csv_separator: character between the fields of scores.csv and regions.csv, or "tab"; a comma by default, with
            --decimal-comma a semicolon
        decimal_comma: write 1,25 instead of 1.25 in these files, as spreadsheets in much of Europe expect it
        bom: begin these files with a byte order mark, so that Excel reads umlauts and other letters in file names
        xlsx: write scores.xlsx too, a workbook with the sheets "scores" and "regions"
    """

    csv_separator: str | None = None
    decimal_comma: bool = False
    bom: bool = False
    xlsx: bool = False

    def __post_init__(self) -> None:
        separator = self.separator
        if len(separator) != 1 or separator.isalnum() or separator in '"\r\n.-+_ ' or not separator.isascii():
            raise ValueError(f"csv separator {separator!r}; expected one character such as , ; | or the word tab")
        if self.decimal_comma and separator == ",":
            raise ValueError(
                "a comma cannot stand both between fields and in numbers (--csv-separator , with --decimal-comma): "
                'leave out --csv-separator, which is then a semicolon, or give ";" or tab'
            )
        if self.xlsx:
            from adpretrain.extras import need

            need("xlsx", "openpyxl")

    @property
    def separator(self) -> str:
        """The character between two fields."""
        if self.csv_separator is None:
            return ";" if self.decimal_comma else ","
        return "\t" if self.csv_separator == "tab" else self.csv_separator


PLAIN = Tables()
