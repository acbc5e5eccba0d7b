"""Skin lesions (ISIC 2018, task 3): ``ISIC2018_Task3_{Training|Validation}_Input/{image}.jpg`` and their classes.

The classes are in ``ISIC2018_Task3_{Training|Validation}_GroundTruth/*.csv`` (or in a file of that name beside the
folders): a column for the image and one for each of seven classes, of which one is 1. The split of ReContrast (App. B):
the training images of NV (nevus), the normal class, and all validation images as test images. Training images of other
classes are not used.
"""

from __future__ import annotations

from pathlib import Path

from adpretrain.data.layouts.listing import listed_photographs, read_listing
from adpretrain.data.layouts.tree import existing_folder
from adpretrain.data.samples import GOOD, Sample

NORMAL = "NV"
CLASSES = ("MEL", NORMAL, "BCC", "AKIEC", "BKL", "DF", "VASC")
PARTS = {"train": "ISIC2018_Task3_Training", "test": "ISIC2018_Task3_Validation"}


def index_isic2018(root: str | Path) -> list[Sample]:
    """Samples of the only category, "isic2018"; a defect is the name of its class in lower case. There are no masks.

    Raises ValueError if a folder or a CSV file is absent, a line has not exactly one class, an image that is listed is
    not there, or there is no training image of NV.
    """
    path = existing_folder(root)
    samples = []
    for split, part in PARTS.items():
        listing, folder = _listing(path, part), path / f"{part}_Input"
        if not folder.is_dir():
            raise ValueError(f"{path} is not the ISIC 2018 set of task 3: expected the folder {folder.name} in it")
        rows = read_listing(listing, ("image", *CLASSES))
        kinds = [_class(row, f"line {number} of {listing}") for number, row in enumerate(rows, start=2)]
        used = [
            (row["image"], kind) for row, kind in zip(rows, kinds, strict=True) if split == "test" or kind == NORMAL
        ]
        images = listed_photographs(folder, [name for name, _ in used], ".jpg", listing)
        samples += [
            Sample(image, None, "isic2018", GOOD if kind == NORMAL else kind.lower(), None, split)
            for image, (_, kind) in zip(images, used, strict=True)
        ]
    if not any(sample.split == "train" for sample in samples):
        raise ValueError(f"{_listing(path, PARTS['train'])} lists no image of {NORMAL}: there is nothing to train on")
    return samples


def _listing(root: Path, part: str) -> Path:
    name = f"{part}_GroundTruth"
    found = sorted(file for file in (root / name).glob("*.csv") if not file.name.startswith("."))
    if (root / f"{name}.csv").is_file():
        found.append(root / f"{name}.csv")
    if not found:
        raise ValueError(f"{root} is not the ISIC 2018 set of task 3: expected {name}/{name}.csv in it")
    return found[0]


def _class(row: dict[str, str], where: str) -> str:
    """The class of a line, of whose columns one is 1 (written 1.0) and the others are 0."""
    values = {name: row[name].strip() for name in CLASSES}
    kinds = [name for name, value in values.items() if value in ("1", "1.0")]
    if len(kinds) != 1 or any(value not in ("0", "0.0") for name, value in values.items() if name not in kinds):
        said = ", ".join(f"{name} {value!r}" for name, value in values.items())
        raise ValueError(f"{where} has {said}; expected 1 for one class and 0 for the others")
    return kinds[0]
