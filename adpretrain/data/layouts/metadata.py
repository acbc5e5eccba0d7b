"""The meaning of a Hugging Face data set's columns, and image folders with a metadata.csv or metadata.jsonl.

Such folders are read here and not by `datasets`, which refuses splits whose mask column is empty (a training split has
no defects) and overlooks a metadata file above the splits' folders.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adpretrain.data.layouts.tree import inside
from adpretrain.data.samples import GOOD, Sample
from adpretrain.photographs import read_mask

GUESSES: dict[str, tuple[str, ...]] = {  # role -> usual names; the first one that exists is taken
    "image": ("image", "img", "photo", "file_name", "image_file_name"),
    "mask": ("mask", "ground_truth", "segmentation", "gt", "mask_file_name"),
    "label": ("label", "anomaly", "is_anomalous", "is_anomaly", "defect", "defect_type"),
    "category": ("category", "object", "class", "product"),
    "split": ("split",),
}
FIX = "name it with columns, such as {image: photo, mask: segmentation, label: is_bad}"
NORMAL = ("good", "normal", "ok", "false", "none", "no", "0")  # labels of a normal image, in any case
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


def metadata_files(root: Path) -> list[Path]:
    """The metadata files in ``root`` and its subfolders, sorted."""
    found = (file for name in ("metadata.csv", "metadata.jsonl") for file in root.rglob(name))
    return sorted(file for file in found if file.is_file())


def index_metadata(root: Path, file: Path, columns: Mapping[str, str]) -> Iterator[tuple[Sample, str]]:
    """(sample, where it is listed) for every row of one metadata file.

    Names of images and masks are relative to the file's own folder. Without a split column, the split is that of the
    first folder below ``root`` with a split's name, else "train"; without a category column the category is
    ``root``'s name.

    Raises ValueError for a file that cannot be read, columns or labels that are not understood, or a path outside
    ``root``.
    """
    chosen: dict[str, str] = {}
    for number, line in _lines(file):
        where = f"line {number} of {file}"
        chosen = chosen or choose_columns(dict.fromkeys(line, "text"), columns, str(file))
        row = {role: line.get(column) for role, column in chosen.items()}
        if not row["image"]:
            raise ValueError(f"{where} has no image")
        folder = file.parent.relative_to(root)
        image = inside(root, (folder / str(row["image"])).as_posix(), where)
        mask = inside(root, (folder / str(row["mask"])).as_posix(), where) if row.get("mask") else None
        split = split_of(str(row["split"]), where) if "split" in row else _split(image.relative_to(root))
        category = str(row.get("category") or root.resolve().name)
        yield Sample(image, mask, category, defect_of(row, mask, where), None, split), where


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            if file.suffix == ".csv":
                yield from enumerate(csv.DictReader(lines, restkey="", restval=""), start=2)
            else:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield number, _object(line, number)
    except (csv.Error, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a readable metadata file: {error}") from error


def _object(line: str, number: int) -> dict[str, Any]:
    content = json.loads(line)
    if not isinstance(content, dict):
        raise ValueError(f"line {number} is not a JSON object")
    return content


def _split(image: Path) -> str:
    names = [split for part in image.parts[:-1] for split, known in SPLIT_NAMES.items() if part.lower() in known]
    return names[0] if names else "train"


def choose_columns(found: Mapping[str, str], asked: Mapping[str, str], where: str) -> dict[str, str]:
    """Role (image, mask, label, category, split) -> column, for roles that have one; asking for "" leaves a role out.

    ``found``: the columns' names and kinds. Raises ValueError listing them if a column that was asked for is absent, if
    there is no image column, or neither mask nor label.
    """
    listing = f"columns found: {', '.join(f'{name} ({kind})' for name, kind in found.items())}"
    if unknown := [role for role in asked if role not in GUESSES]:
        raise ValueError(f"columns {unknown} are unknown; name any of: {', '.join(GUESSES)}")
    if absent := [name for name in asked.values() if name and name not in found]:
        raise ValueError(f"columns {absent} are not in {where}; {listing}")
    lower = {name.lower(): name for name in reversed(list(found))}
    guessed = {role: next((lower[guess] for guess in names if guess in lower), "") for role, names in GUESSES.items()}
    chosen = {role: name for role, name in {**guessed, **asked}.items() if name}
    if "image" not in chosen:
        raise ValueError(f"{where} has no column named {' or '.join(GUESSES['image'])}; {listing}; {FIX}")
    if not {"mask", "label"} & set(chosen):
        guesses = " or ".join(GUESSES["label"] + GUESSES["mask"])
        raise ValueError(f"{where} has no label and no mask ({guesses}); {listing}; {FIX}")
    return chosen


def defect_of(row: Mapping[str, Any], mask: Path | None, where: str) -> str:
    """The kind of defect of a row {role: value}: from its label or, without labels, from whether its mask has marks."""
    if "label" in row:
        return meaning_of(row["label"], where)
    return "anomaly" if mask is not None and read_mask(mask).getbbox() else GOOD


def meaning_of(label: Any, where: str) -> str:
    """ "good" for False, 0 and the names of `NORMAL`; "anomaly" for True and other numbers; else the label itself.

    Raises ValueError for an empty label, a negative number or NaN.
    """
    if isinstance(label, str) and label.strip():
        text = label.strip()
        number = text.lower() in ("1", "true", "yes")
        return GOOD if text.lower() in NORMAL else "anomaly" if number else text
    if isinstance(label, int | float) and not math.isnan(label) and label >= 0:
        return "anomaly" if label else GOOD
    raise ValueError(f"label {label!r} in {where} is neither normal nor anomalous")


def split_of(name: str, where: str) -> str:
    """ "train", "validation" or "test" for their usual names. Raises ValueError for another."""
    for split, names in SPLIT_NAMES.items():
        if name.lower() in names:
            return split
    valid = ", ".join(known for names in SPLIT_NAMES.values() for known in names)
    raise ValueError(f"split {name!r} of {where} is unknown; valid: {valid}")
