"""A labelled photograph (`Sample`) and a torch data set of them (`ImageDataset`)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from adpretrain.preprocess import Preprocess, read_image, read_mask

GOOD = "good"
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Sample:
    """One photograph. ``defect`` is "good" for a normal one; ``mask`` is None where nothing is marked."""

    image: Path
    mask: Path | None
    category: str
    defect: str
    view: str | None
    split: str

    @property
    def anomalous(self) -> bool:
        return self.defect != GOOD


def is_image(path: Path) -> bool:
    """Whether the name looks like a photograph (suffix known, not hidden)."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


class ImageDataset(Dataset[dict[str, Any]]):
    """Samples as tensors.

    An item is a dict: ``image`` float [3, S, S], ``mask`` bool [S, S] (all False for a normal image), ``label``
    (1 = anomalous), ``category``, ``defect``, ``view`` ("" if none), ``path`` and ``index``.

    ``on_error="raise"`` (default): a missing or corrupted file raises ValueError naming it, when it is read.
    ``on_error="skip"``: the files are checked up front, the bad ones are left out, listed once in a warning and
    kept in ``.skipped`` as (path, reason) pairs.
    """

    def __init__(self, samples: Sequence[Sample], preprocess: Preprocess, on_error: str = "raise") -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error {on_error!r} is unknown; choose 'raise' or 'skip'")
        self.preprocess = preprocess
        self.samples = list(samples)
        self.skipped: list[tuple[Path, str]] = []
        if on_error == "skip":
            self.samples = [sample for sample in self.samples if self._readable(sample)]
            if self.skipped:
                listing = "\n".join(f"  {reason}" for _, reason in self.skipped)
                warnings.warn(f"{len(self.skipped)} unreadable samples are skipped:\n{listing}", stacklevel=2)

    def _readable(self, sample: Sample) -> bool:
        try:
            load_mask(sample, read_image(sample.image).size, self.preprocess)
        except ValueError as error:
            self.skipped.append((sample.image, str(error)))
            return False
        return True

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        image = read_image(sample.image)
        return {
            "image": self.preprocess(image),
            "mask": load_mask(sample, image.size, self.preprocess),
            "label": int(sample.anomalous),
            "category": sample.category,
            "defect": sample.defect,
            "view": sample.view or "",
            "path": str(sample.image),
            "index": index,
        }


def load_mask(sample: Sample, image_size: tuple[int, int], preprocess: Preprocess) -> Tensor:
    """The sample's mask as bool [S, S], all False without one.

    Raises ValueError if the mask's size differs from the image's: one of the two files is the wrong one.
    """
    if sample.mask is None:
        return torch.zeros(preprocess.image_size, preprocess.image_size, dtype=torch.bool)
    mask = read_mask(sample.mask)
    if mask.size != image_size:
        raise ValueError(
            f"mask {sample.mask} is {mask.size[0]}x{mask.size[1]} but its image {sample.image} is "
            f"{image_size[0]}x{image_size[1]} pixels; they must be of one size"
        )
    return preprocess.mask(mask)
