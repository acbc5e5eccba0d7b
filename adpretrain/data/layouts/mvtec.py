"""MVTec AD and data sets in its layout (MPDD, and many private ones).

``{category}/train/good/*``, ``{category}/test/{good|defect}/*``, ``{category}/ground_truth/{defect}/{stem}_mask.png``
(or ``{stem}.png``). A ``{category}/validation`` folder is of split "validation".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adpretrain.data.layouts.tree import Masks, by_stem, category_folders, index_splits
from adpretrain.data.samples import Sample


def index_mvtec(root: str | Path, categories: Sequence[str] = ()) -> list[Sample]:
    """Samples of all (or the named) categories; ``root`` may also be one category's own folder.

    Raises ValueError if the layout is not MVTec's, a named category is absent, or only some of its defects have a mask.
    """
    found = category_folders(root, "train/good", "MVTec", categories)
    return index_splits(found, _masks, "ground_truth/{defect}/{stem}_mask.png")


def _masks(category: Path, kind: Path) -> Masks:
    files = by_stem(category / "ground_truth" / kind.name)
    return {stem.removesuffix("_mask"): file for stem, file in files.items()}
