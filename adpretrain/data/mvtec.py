"""MVTec AD and sets in its layout (MPDD).

``{category}/train/good/*``, ``{category}/test/{good|defect}/*``, ``{category}/ground_truth/{defect}/{stem}_mask.png``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adpretrain.data.folder import existing_folder
from adpretrain.data.samples import GOOD, Sample, is_image


def index_mvtec(root: str | Path, categories: Sequence[str] = ()) -> list[Sample]:
    """Samples of all (or the named) categories; ``root`` may also be one category's own folder.

    Raises ValueError if the layout is not MVTec's, a named category is absent, or a defect has no mask.
    """
    path = existing_folder(root)
    if (path / "train" / GOOD).is_dir():
        path, found = path.parent, {path.name: path}
    else:
        found = {folder.name: folder for folder in sorted(path.iterdir()) if (folder / "train" / GOOD).is_dir()}
    if not found:
        raise ValueError(f"{path} is not in the MVTec layout: expected {{category}}/train/good/ folders")
    if unknown := [name for name in categories if name not in found]:
        raise ValueError(f"categories {unknown} are not in {path}; found: {', '.join(found)}")
    samples = []
    for name in categories or found:
        for split in ("train", "test"):
            for folder in sorted(path for path in (found[name] / split).glob("*") if path.is_dir()):
                samples += _of_defect(found[name], split, folder)
    return samples


def _of_defect(category: Path, split: str, folder: Path) -> list[Sample]:
    samples = []
    for image in sorted(file for file in folder.iterdir() if is_image(file)):
        mask = None
        if folder.name != GOOD:
            mask = category / "ground_truth" / folder.name / f"{image.stem}_mask.png"
            if not mask.is_file():
                raise ValueError(f"{image} is a defect without a mask: expected {mask}")
        samples.append(Sample(image, mask, category.name, folder.name, None, split))
    return samples
