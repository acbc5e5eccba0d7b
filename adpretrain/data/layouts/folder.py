"""A plain folder of photographs."""

from __future__ import annotations

from pathlib import Path

from adpretrain.data.layouts.tree import existing_folder, is_hidden
from adpretrain.data.samples import GOOD, IMAGE_SUFFIXES, Sample, is_image


def index_folder(root: str | Path, category: str = "", defect: str = GOOD, split: str = "test") -> list[Sample]:
    """Every photograph below ``root``, recursively, in sorted order, as samples of one category and defect;
    hidden files and folders are left out.

    Raises ValueError if the folder does not exist or holds no photograph.
    """
    path = existing_folder(root)
    seen = (file for file in path.rglob("*") if is_image(file) and file.is_file())
    images = sorted(file for file in seen if not is_hidden(file, path))
    if not images:
        raise ValueError(f"no images in {path} (looked for {', '.join(IMAGE_SUFFIXES)}, also in subfolders)")
    return [Sample(image, None, category or path.name, defect, None, split) for image in images]
