"""Data sets: one index function per layout, each giving a list of `Sample`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from adpretrain.data.folder import index_folder
from adpretrain.data.mtd import index_mtd
from adpretrain.data.mvtec import index_mvtec
from adpretrain.data.realiad import index_realiad
from adpretrain.data.samples import GOOD, ImageDataset, Sample

__all__ = ["DATASETS", "GOOD", "ImageDataset", "Sample", "index_dataset"]

DATASETS: dict[str, Callable[..., list[Sample]]] = {
    "realiad": index_realiad,
    "mvtec": index_mvtec,
    "mtd": index_mtd,
    "folder": index_folder,
}


def index_dataset(name: str, root: str | Path) -> list[Sample]:
    """The samples of a data set on disk; "auto" finds the layout.

    Raises ValueError for an unknown name or a folder of another layout.
    """
    if name == "auto":
        return _detect(root)
    if name not in DATASETS:
        raise ValueError(f"data set {name!r} is unknown; choose one of: auto, {', '.join(DATASETS)}")
    return DATASETS[name](root)


def _detect(root: str | Path) -> list[Sample]:
    reasons = []
    for name in ("realiad", "mvtec", "mtd"):  # a plain folder has no labels and would match anything
        try:
            return DATASETS[name](root)
        except ValueError as error:
            reasons.append(f"  {name}: {error}")
    raise ValueError(f"{root} is in none of the known layouts:\n" + "\n".join(reasons))
