"""The regions of inspected photographs as files: regions.csv, regions.json (COCO), masks/*.png and maps/*.tif."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from adpretrain.files import atomic_path
from downstream.inspection import PLAIN, Tables
from downstream.inspection.photos import printable
from downstream.inspection.spreadsheet import table_file
from downstream.regions import Region, paint
from downstream.visualise import save_png

_CATEGORY = {"id": 1, "name": "anomaly"}


@dataclass(frozen=True)
class Finding:
    """One region of a photograph in plain numbers, as regions.csv, regions.json and the record of a run hold it."""

    path: str  # of the photograph, as in scores.csv
    number: int  # 1 for the region with the highest peak of the photograph
    left: int  # the box in pixels of the photograph, half-open
    top: int
    right: int
    bottom: int
    area_px: float  # square pixels
    area_mm2: float | None  # square millimetres; None if the size of a pixel is not known
    peak: float  # highest map value
    mean: float
    peak_x: int
    peak_y: int
    counts: tuple[int, ...]  # the mask, see `run_lengths`


def finding_from(entry: Mapping[str, Any]) -> Finding:
    """Read a finding back from JSON. Raises KeyError, TypeError or ValueError if it is none."""
    whole = ("number", "left", "top", "right", "bottom", "peak_x", "peak_y")
    return Finding(
        **{name: int(entry[name]) for name in whole},
        path=str(entry["path"]),
        area_px=float(entry["area_px"]),
        area_mm2=None if entry["area_mm2"] is None else float(entry["area_mm2"]),
        peak=float(entry["peak"]),
        mean=float(entry["mean"]),
        counts=tuple(map(int, entry["counts"])),
    )


AddFindings = Callable[[str, tuple[int, int], Sequence[Finding]], None]
COLUMNS = tuple(field.name for field in dataclasses.fields(Finding) if field.name != "counts")


def findings_of(path: str, regions: Sequence[Region], photo_size: tuple[int, int]) -> list[Finding]:
    """Turn the regions of one photograph of ``photo_size`` (width, height), sorted by peak, into findings."""
    return [
        Finding(
            path,
            number,
            *region.box,
            region.area,
            region.area_mm2,
            region.peak,
            region.mean,
            *region.peak_at,
            run_lengths(region, photo_size),
        )
        for number, region in enumerate(regions, start=1)
    ]


def run_lengths(region: Region, photo_size: tuple[int, int]) -> tuple[int, ...]:
    """Return a region's mask as the uncompressed run lengths of COCO: pixels outside, inside, outside, ... of the
    photograph read column by column. Only the box of the region is painted, so large photographs cost nothing.
    """
    (width, height), (left, top, _, _) = photo_size, region.box
    columns = np.pad(region.painted().T, ((0, 0), (1, 1))).astype(np.int8)
    # Starts and ends alternate in each column, and come out column by column.
    column, row = np.nonzero(np.diff(columns, axis=1))
    places = (left + column) * height + top + row
    # A run that reaches the bottom of the photograph goes on at the top of the next column if it starts there.
    broken = np.flatnonzero(places[1:-1:2] == places[2::2]) * 2 + 1
    places = np.delete(places, np.concatenate([broken, broken + 1]))
    counts = np.diff(places, prepend=0, append=width * height).tolist()
    return tuple(counts if counts[-1] else counts[:-1])


@contextlib.contextmanager
def findings_files(out: Path, tables: Tables = PLAIN) -> Iterator[AddFindings]:
    """Write regions.csv and regions.json (COCO) below ``out`` in a ``with`` statement, photograph by photograph.

    Yields a function that takes a photograph's path, its (width, height), and its findings, of which there may be none.
    Nothing is kept in memory, and the files appear at the end.
    """
    with (
        table_file(out / "regions.csv", COLUMNS, tables) as add_row,
        atomic_path(out / "regions.json") as temporary,
        temporary.open("w", encoding="utf-8") as coco,
        TemporaryFile("w+", encoding="utf-8", dir=out) as annotations,  # behind all photographs in the file
    ):
        photographs, numbers = count(1), count(1)

        def add(path: str, size: tuple[int, int], findings: Sequence[Finding]) -> None:
            photograph = next(photographs)
            image = {"id": photograph, "file_name": printable(path), "width": size[0], "height": size[1]}
            _write_item(coco, image, first=photograph == 1)
            for finding in findings:
                add_row(finding)
                number = next(numbers)
                _write_item(annotations, _annotation(finding, number, photograph, size), first=number == 1)

        coco.write('{"images": [')
        yield add
        annotations.seek(0)
        coco.write('], "annotations": [')
        shutil.copyfileobj(annotations, coco)
        coco.write(f'], "categories": [{json.dumps(_CATEGORY)}]}}')


def _write_item(file: IO[str], item: Mapping[str, object], first: bool) -> None:
    file.write(f"{'' if first else ', '}{json.dumps(item, allow_nan=False)}")


def _annotation(finding: Finding, number: int, photograph: int, size: tuple[int, int]) -> dict[str, object]:
    """A finding as COCO's annotation. Its "score" is the peak, as in COCO's results."""
    return {
        "id": number,
        "image_id": photograph,
        "category_id": _CATEGORY["id"],
        "bbox": [finding.left, finding.top, finding.right - finding.left, finding.bottom - finding.top],
        "area": finding.area_px,
        "segmentation": {"size": list(size[::-1]), "counts": finding.counts},
        "iscrowd": 0,
        "score": finding.peak,
    }


def write_mask(path: Path, regions: Sequence[Region], photo_size: tuple[int, int]) -> None:
    """Write an 8-bit PNG of ``photo_size`` (width, height) that is 255 inside the regions and 0 elsewhere."""
    save_png(Image.fromarray(paint(regions, photo_size).astype(np.uint8) * 255), path)


def write_map(path: Path, map_HW: ArrayLike) -> None:
    """Write a map [H, W] as a TIFF of uncompressed float32, which reads back to the same bits, NaN included."""
    with atomic_path(path) as temporary:
        Image.fromarray(np.asarray(map_HW, dtype=np.float32)).save(temporary, format="TIFF")
