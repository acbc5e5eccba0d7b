"""Magnetic Tile Defects (Huang et al.): ``MT_{Free|Blowhole|Break|Crack|Fray|Uneven}/Imgs/*.jpg``, masks ``.png``.

The sorted names are in the order of the experiment, during which brightness drifts strongly, so normal images go to the
test split by stride: a split by position would test under another lighting than it was fitted on.
"""

from __future__ import annotations

from pathlib import Path

from adpretrain.data.layouts.tree import existing_folder, images_in
from adpretrain.data.samples import GOOD, Sample, refuse_missing

TEST_STRIDE = 5  # every 5th normal image is a test image


def index_mtd(root: str | Path) -> list[Sample]:
    """All samples: category "tile", defects in lower case, normals split by stride.

    Raises ValueError if ``MT_Free/Imgs`` is missing or only some of its defects have a mask.
    """
    path = existing_folder(root)
    normals = _photographs(path / "MT_Free" / "Imgs")
    if not normals:
        raise ValueError(f"{path} is not the Magnetic Tile set: expected MT_Free/Imgs/*.jpg")
    samples = [
        Sample(image, None, "tile", GOOD, None, "train" if index % TEST_STRIDE else "test")
        for index, image in enumerate(normals)
    ]
    missing: dict[Path, str] = {}
    for folder in sorted(path.glob("MT_*/Imgs")):
        defect = folder.parent.name.removeprefix("MT_").lower()
        if defect == "free":
            continue
        masks = {file.stem: file for file in images_in(folder) if file.suffix.lower() == ".png"}
        for image in _photographs(folder):
            mask = masks.get(image.stem)
            if mask is None:
                missing[image] = f"{image} is a defect without a mask: expected {image.with_suffix('.png')}"
            samples.append(Sample(image, mask, "tile", defect, None, "test"))
    refuse_missing(samples, missing)
    return samples


def _photographs(folder: Path) -> list[Path]:
    return [file for file in images_in(folder) if file.suffix.lower() == ".jpg"]
