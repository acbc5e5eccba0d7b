"""A plain folder of photographs."""

from __future__ import annotations

from pathlib import Path

from adpretrain.data.samples import GOOD, IMAGE_SUFFIXES, Sample, is_image


def existing_folder(root: str | Path, what: str = "folder") -> Path:
    """``root`` as a Path. Raises ValueError naming it if it is not a folder."""
    path = Path(root)
    if not path.is_dir():
        raise ValueError(f"{what} not found: {path}" + (" is a file, not a folder" if path.is_file() else ""))
    return path


def index_folder(root: str | Path, category: str = "", defect: str = GOOD, split: str = "test") -> list[Sample]:
    """Every photograph below ``root``, recursively, in sorted order, as samples of one category and defect.

    Raises ValueError if the folder does not exist or holds no photograph.
    """
    path = existing_folder(root)
    images = sorted(file for file in path.rglob("*") if file.is_file() and is_image(file))
    if not images:
        raise ValueError(f"no images in {path} (looked for {', '.join(IMAGE_SUFFIXES)}, also in subfolders)")
    return [Sample(image, None, category or path.name, defect, None, split) for image in images]
