"""VisA: every image is a line of ``split_csv/1cls.csv`` with the columns object, split, label, image and mask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adpretrain.data.layouts.listing import read_listing
from adpretrain.data.layouts.tree import SPLITS, existing_folder, inside
from adpretrain.data.samples import GOOD, Sample, refuse_missing

COLUMNS = ("object", "split", "label", "image", "mask")
DEFECTS = {"normal": GOOD, "anomaly": "anomaly"}


def index_visa(root: str | Path, categories: Sequence[str] = (), protocol: str = "1cls") -> list[Sample]:
    """Samples of all (or the named) categories in the file's order; ``root`` may also be one category's own folder.

    ``protocol`` is the name of another split file, such as "2cls_fewshot". The defect of every anomaly is "anomaly".

    Raises ValueError if the split file is absent, lacks a column, holds an unknown split or label or a path outside the
    set's folder, if a named category is absent, or only some of its defects have a mask.
    """
    path = existing_folder(root, "VisA folder")
    if not (path / "split_csv").is_dir() and (path.resolve().parent / "split_csv").is_dir():
        own = path.resolve()
        path, categories = own.parent, [own.name]
    rows = _read(path / "split_csv" / f"{protocol}.csv")
    present = list(dict.fromkeys(row["object"] for row in rows))
    if unknown := [name for name in categories if name not in present]:
        raise ValueError(f"categories {unknown} are not in {path}; found: {', '.join(present)}")
    samples: list[Sample] = []
    missing: dict[Path, str] = {}
    for number, row in enumerate(rows, start=2):
        if categories and row["object"] not in categories:
            continue
        sample = _sample(path, row, f"line {number} of {protocol}.csv")
        if sample.anomalous and sample.mask is None:
            expected = (
                f"expected {path / row['mask']}" if row["mask"] else f"line {number} of {protocol}.csv names none"
            )
            missing[sample.image] = f"{sample.image} is a defect without a mask: {expected}"
        samples.append(sample)
    refuse_missing(samples, missing)
    return samples


def _read(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        present = sorted(other.stem for other in file.parent.glob("*.csv"))
        raise ValueError(f"VisA split file not found: {file}; split files present: {', '.join(present) or 'none'}")
    return read_listing(file, COLUMNS)


def _sample(root: Path, row: dict[str, str], where: str) -> Sample:
    for column, valid in (("split", SPLITS), ("label", tuple(DEFECTS))):
        if row[column] not in valid:
            raise ValueError(f"{column} {row[column]!r} in {where} is unknown; valid: {', '.join(valid)}")
    defect = DEFECTS[row["label"]]
    mask = inside(root, row["mask"], where) if row["mask"] else None
    if mask is not None and defect != GOOD and not mask.is_file():
        mask = None
    return Sample(inside(root, row["image"], where), mask, row["object"], defect, None, row["split"])
