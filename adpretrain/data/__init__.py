"""Data sets: one index function per layout, each giving a list of `Sample`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from adpretrain.data.layouts.detect import detect_layout
from adpretrain.data.samples import GOOD, ImageDataset, Junk, LeftOut, MissingMasks, Sample

__all__ = [
    "DATASETS",
    "GOOD",
    "SPLIT_LISTINGS",
    "ImageDataset",
    "Junk",
    "LeftOut",
    "MissingMasks",
    "Sample",
    "detect_layout",
    "index_dataset",
    "index_with_bare",
]

DATASETS = {  # name of a layout -> its index function, imported when it is used
    "realiad": "adpretrain.data.layouts.realiad:index_realiad",
    "realiad_variety": "adpretrain.data.layouts.realiad:index_realiad_variety",
    "mvtec": "adpretrain.data.layouts.mvtec:index_mvtec",
    "mvtec_ad_2": "adpretrain.data.layouts.mvtec_ad_2:index_mvtec_ad_2",
    "mvtec_loco": "adpretrain.data.layouts.mvtec_loco:index_mvtec_loco",
    "mvtec_3d": "adpretrain.data.layouts.mvtec_3d:index_mvtec_3d",
    "mpdd": "adpretrain.data.layouts.mvtec:index_mvtec",
    "visa": "adpretrain.data.layouts.visa:index_visa",
    "btad": "adpretrain.data.layouts.btad:index_btad",
    "mtd": "adpretrain.data.layouts.mtd:index_mtd",
    "elpv": "adpretrain.data.layouts.elpv:index_elpv",
    "oct2017": "adpretrain.data.layouts.oct2017:index_oct2017",
    "aptos": "adpretrain.data.layouts.aptos:index_aptos",
    "isic2018": "adpretrain.data.layouts.isic2018:index_isic2018",
    "folder": "adpretrain.data.layouts.folder:index_folder",
    "hf": "adpretrain.data.huggingface:index_hf",
}
SPLIT_LISTINGS = {  # layouts that list splits in files -> an example
    "realiad": "realiad_jsons",
    "realiad_variety": "Real-IAD_Variety_jsons",
    "visa": "1cls",
}


def index_dataset(
    name: str, root: str | Path, columns: Mapping[str, str] | None = None, split: str = ""
) -> list[Sample]:
    """The samples of a data set on disk, or of "hf://org/name"; "auto" finds the layout.

    ``columns`` names the columns of a Hugging Face data set that cannot be guessed (`index_hf`). ``split`` names the
    file or folder that lists training and test images, if a layout has several (`SPLIT_LISTINGS`: ``protocol`` of
    `index_realiad` and `index_visa`); "" = the index function's default.

    Raises ValueError for an unknown name, a folder of another layout, ``columns`` or ``split`` for a layout that has
    none, a ``split`` that does not exist, or a product without a full scale (`with_full_scales`).
    """
    if name != "auto" and name not in DATASETS:
        raise ValueError(f"data set {name!r} is unknown; choose one of: auto, {', '.join(DATASETS)}")
    layout = detect_layout(root) if name == "auto" else name
    if split and layout not in SPLIT_LISTINGS:
        valid = ", ".join(f"{kind} (such as {listing})" for kind, listing in SPLIT_LISTINGS.items())
        raise ValueError(
            f"split {split!r}: {root} is read as {layout!r}; listings to choose from exist for {valid} only"
        )
    options: dict[str, Any] = {"protocol": split} if split else {}
    if layout == "hf":
        options = {"columns": columns}
    elif columns:
        raise ValueError(f"columns {dict(columns)} are for 'hf' data sets only; {root} is read as {layout!r}")
    return _with_full_scales(resolve_name(DATASETS[layout])(root, **options))


def index_with_bare(
    name: str, root: str | Path, columns: Mapping[str, str] | None = None, split: str = ""
) -> tuple[list[Sample], dict[Path, str]]:
    """As `index_dataset`, for uses that need no mask: defects without one are in the samples too, and a line for each
    says where it was expected, if the layout knows."""
    try:
        return index_dataset(name, root, columns, split), {}
    except MissingMasks as error:
        return _with_full_scales(error.samples), error.missing


def _with_full_scales(samples: list[Sample]) -> list[Sample]:
    from adpretrain.data.products import with_full_scales  # a run that reads no data set does without it

    return with_full_scales(samples)
