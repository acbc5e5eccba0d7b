"""What the columns and values of a Hugging Face data set mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adpretrain.data.samples import GOOD
from adpretrain.preprocess import read_mask

GUESSES: dict[str, tuple[str, ...]] = {  # role -> usual names, the first one that is there is taken
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


def choose_columns(found: Mapping[str, str], asked: Mapping[str, str], where: str) -> dict[str, str]:
    """Role (image, mask, label, category, split) -> column, for those that are there; asking for "" leaves one out.

    ``found`` are the columns' names and kinds. Raises ValueError listing them if one that was asked for is absent, or
    if there is no image, or neither mask nor label.
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
    """The kind of defect of a row {role: value}: what its label says, or without labels whether its mask has marks."""
    if "label" in row:
        return meaning_of(row["label"], where)
    return "anomaly" if mask is not None and read_mask(mask).getbbox() else GOOD


def meaning_of(label: Any, where: str) -> str:
    """ "good" for False, 0 and the names of `NORMAL`; "anomaly" for True and other numbers; else the label itself.

    Raises ValueError for a label that says neither: none at all, a negative number, not a number.
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
