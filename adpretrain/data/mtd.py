"""Magnetic Tile Defects (Huang et al.): ``MT_{Free|Blowhole|Break|Crack|Fray|Uneven}/Imgs/*.jpg``, masks ``.png``.

The sorted names are the order of the experiment, with a strong drift in brightness, so normal images go to the
test split by stride: a split by prefix would test on another lighting than it was fitted on.
"""

from __future__ import annotations

from pathlib import Path

from adpretrain.data.folder import existing_folder
from adpretrain.data.samples import GOOD, Sample

TEST_STRIDE = 5  # every 5th normal image is a test image


def index_mtd(root: str | Path) -> list[Sample]:
    """All samples: category "tile", defects in lower case, normals split by stride.

    Raises ValueError if ``MT_Free/Imgs`` is missing.
    """
    path = existing_folder(root)
    normals = sorted((path / "MT_Free" / "Imgs").glob("*.jpg"))
    if not normals:
        raise ValueError(f"{path} is not the Magnetic Tile set: expected MT_Free/Imgs/*.jpg")
    samples = [
        Sample(image, None, "tile", GOOD, None, "train" if index % TEST_STRIDE else "test")
        for index, image in enumerate(normals)
    ]
    for folder in sorted(path.glob("MT_*/Imgs")):
        defect = folder.parent.name.removeprefix("MT_").lower()
        if defect == "free":
            continue
        for image in sorted(folder.glob("*.jpg")):
            mask = image.with_suffix(".png")
            if not mask.is_file():
                raise ValueError(f"{image} is a defect without a mask: expected {mask}")
            samples.append(Sample(image, mask, "tile", defect, None, "test"))
    return samples
