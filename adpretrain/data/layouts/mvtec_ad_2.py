"""MVTec AD 2 (Heckler-Kram et al. 2025): MVTec's folders, but for those of the test images and their masks.

``{category}/{train|validation}/good/*``, ``{category}/test_public/{good|bad}/*``,
``{category}/test_public/ground_truth/bad/{stem}_mask.png``. The light of a photograph is the end of its name
("000_regular.png", "001_overexposed.png"). The labels of ``{category}/test_private`` and ``test_private_mixed`` are on
the benchmark's server only, so that these are not indexed; `adpretrain score` reads them as plain folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adpretrain.data.layouts.tree import Masks, by_stem, category_folders, index_splits
from adpretrain.data.samples import Sample

TEST = "test_public"


def index_mvtec_ad_2(root: str | Path, categories: Sequence[str] = ()) -> list[Sample]:
    """Samples of all (or the named) categories; ``root`` may also be one category's own folder. The defect is "bad".

    Raises ValueError if the layout is not MVTec AD 2's, a named category is absent, or only some of its defects have a
    mask.
    """
    found = category_folders(root, f"{TEST}/good", "MVTec AD 2", categories)
    return index_splits(found, _masks, f"{TEST}/ground_truth/{{defect}}/{{stem}}_mask.png", test=TEST)


def _masks(category: Path, kind: Path) -> Masks:
    files = by_stem(category / TEST / "ground_truth" / kind.name)
    return {stem.removesuffix("_mask"): file for stem, file in files.items()}
