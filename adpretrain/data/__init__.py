"""Data sets: one index function per layout, each giving a list of `Sample`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from adpretrain.data.huggingface import index_hf
from adpretrain.data.layouts.btad import index_btad
from adpretrain.data.layouts.detect import detect_layout
from adpretrain.data.layouts.elpv import index_elpv
from adpretrain.data.layouts.folder import index_folder
from adpretrain.data.layouts.mtd import index_mtd
from adpretrain.data.layouts.mvtec import index_mvtec
from adpretrain.data.layouts.mvtec_3d import index_mvtec_3d
from adpretrain.data.layouts.mvtec_loco import index_mvtec_loco
from adpretrain.data.layouts.realiad import index_realiad
from adpretrain.data.layouts.visa import index_visa
from adpretrain.data.products import with_full_scales
from adpretrain.data.samples import GOOD, ImageDataset, Junk, LeftOut, MissingMasks, Sample
from adpretrain.references import TooFewImages

__all__ = [
    "DATASETS",
    "GOOD",
    "SPLIT_LISTINGS",
    "ImageDataset",
    "Junk",
    "LeftOut",
    "MissingMasks",
    "Sample",
    "TooFewImages",
    "detect_layout",
    "index_dataset",
    "index_with_bare",
]

DATASETS: dict[str, Callable[..., list[Sample]]] = {
    "realiad": index_realiad,
    "mvtec": index_mvtec,
    "mvtec_loco": index_mvtec_loco,
    "mvtec_3d": index_mvtec_3d,
    "mpdd": index_mvtec,
    "visa": index_visa,
    "btad": index_btad,
    "mtd": index_mtd,
    "elpv": index_elpv,
    "folder": index_folder,
    "hf": index_hf,
}


SPLIT_LISTINGS = {"realiad": "realiad_jsons", "visa": "1cls"}  # layouts that list splits in files -> an example


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
    if layout == "hf":
        return with_full_scales(index_hf(root, columns))
    if columns:
        raise ValueError(f"columns {dict(columns)} are for 'hf' data sets only; {root} is read as {layout!r}")
    return with_full_scales(DATASETS[layout](root, protocol=split) if split else DATASETS[layout](root))


def index_with_bare(
    name: str, root: str | Path, columns: Mapping[str, str] | None = None, split: str = ""
) -> tuple[list[Sample], dict[Path, str]]:
    """As `index_dataset`, for uses that need no mask: defects without one are in the samples too, and a line for each
    says where it was expected, if the layout knows."""
    try:
        return index_dataset(name, root, columns, split), {}
    except MissingMasks as error:
        return with_full_scales(error.samples), error.missing
