"""Retinas in optical coherence tomography (OCT2017, Kermany et al. 2018): ``{train|test}/{NORMAL|CNV|DME|DRUSEN}/*``.

The split of ReContrast (App. B): the training images of NORMAL, and all test images, of which CNV, DME and DRUSEN are
anomalies. The training images of diseases, and the folder ``val`` of some copies, are not used.
"""

from __future__ import annotations

from pathlib import Path

from adpretrain.data.layouts.tree import existing_folder, images_in
from adpretrain.data.samples import GOOD, Sample

NORMAL, DISEASES = "NORMAL", ("CNV", "DME", "DRUSEN")


def index_oct2017(root: str | Path) -> list[Sample]:
    """Samples of the only category, "oct2017"; a defect is the name of its folder in lower case. There are no masks.

    Raises ValueError that names the folders without images, of those that are needed.
    """
    path = existing_folder(root)
    kinds = [("train", NORMAL), *(("test", kind) for kind in (NORMAL, *DISEASES))]
    found = {f"{split}/{kind}": (split, kind, images_in(path / split / kind)) for split, kind in kinds}
    if empty := [name for name, (_, _, images) in found.items() if not images]:
        raise ValueError(f"{path} is not the whole OCT2017 set: there are no images in {', '.join(empty)}")
    return [
        Sample(image, None, "oct2017", GOOD if kind == NORMAL else kind.lower(), None, split)
        for split, kind, images in found.values()
        for image in images
    ]
