"""MVTec LOCO AD: MVTec's folders with a validation split, and several masks of one image.

``{category}/{train|validation}/good/*``, ``{category}/test/{good|logical_anomalies|structural_anomalies}/*``,
``{category}/ground_truth/{defect}/{stem}/*.png``: one file per region; together they are the image's mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adpretrain.data.layouts.tree import Masks, category_folders, images_in, index_splits, subfolders
from adpretrain.data.samples import Sample


def index_mvtec_loco(root: str | Path, categories: Sequence[str] = ()) -> list[Sample]:
    """Samples of all (or the named) categories; ``root`` may also be one category's own folder.

    Every defect's ``mask`` is a tuple of files. Raises ValueError if the layout is not LOCO's, a named category is
    absent, or only some of its defects have a mask.
    """
    found = category_folders(root, "train/good", "MVTec LOCO", categories)
    return index_splits(found, _masks, "ground_truth/{defect}/{stem}/*.png")


def _masks(category: Path, kind: Path) -> Masks:
    return {folder.name: tuple(images_in(folder)) for folder in subfolders(category / "ground_truth" / kind.name)}
