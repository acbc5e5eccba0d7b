"""BeanTech (BTAD): ``{01|02|03}/train/ok/*``, ``{01|02|03}/test/{ok|ko}/*``, ``{01|02|03}/ground_truth/ko/{stem}.png``.

Photographs and masks are .bmp or .png, in any combination; a mask is found by its name without suffix.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adpretrain.data.layouts.tree import by_stem, category_folders, index_splits
from adpretrain.data.samples import Sample


def index_btad(root: str | Path, categories: Sequence[str] = ()) -> list[Sample]:
    """Samples of all (or the named) categories; ``root`` may also be one category's own folder. The defect is "ko".

    Raises ValueError if the layout is not BTAD's, a named category is absent, or only some of its defects have a mask.
    """
    found = category_folders(root, "train/ok", "BTAD", categories)
    masks = lambda category, kind: by_stem(category / "ground_truth" / kind.name)  # noqa: E731
    return index_splits(found, masks, "ground_truth/{defect}/{stem}.png (or .bmp)", normal="ok")
