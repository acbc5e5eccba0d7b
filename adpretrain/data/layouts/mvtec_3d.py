"""MVTec 3D-AD, its colour photographs only: ``{category}/{train|validation|test}/{good|defect}/{rgb|gt}/{stem}.png``.

The point clouds (``xyz/*.tiff``) are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adpretrain.data.layouts.tree import by_stem, category_folders, index_splits
from adpretrain.data.samples import Sample


def index_mvtec_3d(root: str | Path, categories: Sequence[str] = ()) -> list[Sample]:
    """Samples of all (or the named) categories; ``root`` may also be one category's own folder.

    Raises ValueError if the layout is not MVTec 3D's, a named category is absent, or only some of its defects have
    a mask.
    """
    found = category_folders(root, "train/good/rgb", "MVTec 3D", categories)
    return index_splits(found, lambda _, kind: by_stem(kind / "gt"), "{split}/{defect}/gt/{stem}.png", inner="rgb")
