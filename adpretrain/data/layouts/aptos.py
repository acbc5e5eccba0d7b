"""Fundus photographs (APTOS 2019): ``train.csv`` (id_code, diagnosis) and ``train_images/{id_code}.png``.

The split of ReContrast (App. B): of the 1,805 normal images 1,000 are drawn at random to train on; all others, of
every diagnosis, are test images. The paper names no seed, so that its draw is another one. The challenge's own test
images have no labels and are not used. The paper crops the fundus before it resizes; we read the photographs as they
are.
"""

from __future__ import annotations

from pathlib import Path

from adpretrain.data.layouts.listing import listed_photographs, read_listing
from adpretrain.data.layouts.tree import existing_folder
from adpretrain.data.samples import GOOD, Sample
from adpretrain.references import random_references

GRADES = {"0": GOOD, "1": "mild", "2": "moderate", "3": "severe", "4": "proliferative"}  # of diabetic retinopathy
TRAIN = 1000  # normal images to train on


def index_aptos(root: str | Path, seed: int = 0) -> list[Sample]:
    """Samples of the only category, "aptos", in the order of their names; ``seed`` draws the training images. There are
    no masks.

    Raises ValueError if ``train.csv`` is absent, lacks a column or holds an unknown diagnosis, if an image that it
    lists is not there, or if there are no more than 1,000 normal images.
    """
    path = existing_folder(root)
    listing, folder = path / "train.csv", path / "train_images"
    if not (listing.is_file() and folder.is_dir()):
        raise ValueError(f"{path} is not the APTOS set: expected train.csv and train_images/ in it")
    rows = read_listing(listing, ("id_code", "diagnosis"))
    for number, row in enumerate(rows, start=2):
        if row["diagnosis"] not in GRADES:
            raise ValueError(
                f"diagnosis {row['diagnosis']!r} in line {number} of {listing} is unknown; valid: {', '.join(GRADES)}"
            )
    rows = sorted(rows, key=lambda row: row["id_code"])
    images = listed_photographs(folder, [row["id_code"] for row in rows], ".png", listing)
    defects = [GRADES[row["diagnosis"]] for row in rows]
    normal = [index for index, defect in enumerate(defects) if defect == GOOD]
    if len(normal) <= TRAIN:
        raise ValueError(
            f"{listing} lists {len(normal)} images of diagnosis 0; {TRAIN} are drawn to train on and the others are "
            "test images, so that there must be more: copy the whole set"
        )
    train = {normal[index] for index in random_references(len(normal), TRAIN, seed)}
    return [
        Sample(image, None, "aptos", defect, None, "train" if index in train else "test")
        for index, (image, defect) in enumerate(zip(images, defects, strict=True))
    ]
