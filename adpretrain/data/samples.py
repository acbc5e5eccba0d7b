"""A labelled photograph (`Sample`) and a torch data set of them (`ImageDataset`)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageChops
from torch import Tensor
from torch.utils.data import Dataset

from adpretrain.photographs import read_image, read_mask
from adpretrain.preprocess import Preprocess

GOOD = "good"
SHOWN = 5  # files that an error message names
IMAGE_SUFFIXES = (
    *(".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
FOREIGN_SUFFIXES = (".avif", ".heic", ".heif")  # also photographs: reported as unreadable instead of ignored
VIDEOS = (".avi", ".mkv", ".mov", ".mp4")
RAWS = (".arw", ".cr2", ".dng", ".nef", ".raw")  # a camera's raw data


@dataclass(frozen=True)
class Sample:
    """One photograph.

    ``defect`` is "good" for a normal one; ``mask`` is None if nothing is marked, and a tuple if several files together
    mark the defect; ``split`` is "train", "validation" or "test". ``of_defective_part``: an unmarked view of a part
    that is defective in another view, which a line that makes good parts would not show; it is never learnt from, but
    it is scored as normal. ``full_scale``: the value that is white in photographs of more than 8 bits
    (`adpretrain.data.products.with_full_scales`). ``noise``: a view of a defective part, with its label, in a list of
    training images that a benchmark contaminates on purpose; it is learnt from as if it were normal, but only where
    that is asked for.
    """

    image: Path
    mask: Path | tuple[Path, ...] | None
    category: str
    defect: str
    view: str | None
    split: str
    of_defective_part: bool = False
    full_scale: float | None = None
    noise: bool = False

    def read(self, side: int | None = None) -> Image.Image:
        """The photograph, as `adpretrain.photographs.read_image` gives it; warns once of a product whose photographs
        have values above its full scale."""
        image = read_image(self.image, side, full_scale=self.full_scale)
        if self.full_scale is not None and image.info.get("saturated") is True:
            warnings.warn(
                f"some photographs of {self.category} have values above {self.full_scale:g}, the full scale found from "
                "its normal photographs, and are white there",
                stacklevel=2,
            )
        return image

    @property
    def anomalous(self) -> bool:
        return self.defect != GOOD

    @property
    def mask_files(self) -> tuple[Path, ...]:
        """The mask's files: none, one or several."""
        return self.mask if isinstance(self.mask, tuple) else () if self.mask is None else (self.mask,)


class LeftOut(UserWarning):
    """Files of a data set that are not used."""


class Junk(LeftOut):
    """Files among a data set's masks that are hidden, in hidden folders, or not pictures, and can be ignored."""


class MissingMasks(ValueError):
    """Defects without a mask, in categories where other defects have one. ``missing`` has a line for each image;
    ``samples`` are all samples of the data set."""

    def __init__(self, samples: Sequence[Sample], missing: Mapping[Path, str]) -> None:
        self.samples, self.missing = list(samples), dict(missing)
        shown = list(self.missing.values())[:SHOWN]
        more = f"\nand {len(missing) - SHOWN} more; `adpretrain check-data` lists all" if len(missing) > SHOWN else ""
        super().__init__("\n".join(shown) + more)


def without_masks(samples: Iterable[Sample]) -> list[str]:
    """Categories that have defects but not a single mask: their images can be scored, and no mask is missing."""
    found: dict[str, bool] = {}
    for sample in samples:
        if sample.anomalous:
            found[sample.category] = found.get(sample.category, False) or bool(sample.mask_files)
    return sorted(name for name, masked in found.items() if not masked)


def refuse_missing(samples: Sequence[Sample], missing: Mapping[Path, str]) -> None:
    """Raise `MissingMasks` for the images of ``missing`` (a line for each defect without a mask) in whose category
    other defects have a mask."""
    bare = set(without_masks(samples))
    lost = {s.image: missing[s.image] for s in samples if s.image in missing and s.category not in bare}
    if lost:
        raise MissingMasks(samples, lost)


def is_image(path: Path) -> bool:
    """Whether the name looks like a photograph (suffix known, not hidden)."""
    return path.suffix.lower() in (*IMAGE_SUFFIXES, *FOREIGN_SUFFIXES) and not path.name.startswith(".")


def how_to_make_photographs(suffixes: Iterable[str]) -> str:
    """Say how the videos and raw files among files with these lower-case suffixes become photographs, or nothing."""
    given, found = set(suffixes), list[str]()
    if videos := [suffix for suffix in VIDEOS if suffix in given]:
        found.append(
            f"Videos ({', '.join(videos)}) become photographs with ffmpeg, one for each frame: "
            f"ffmpeg -i clip{videos[0]} frames/%06d.png (into a folder frames that exists)."
        )
    if raws := [suffix for suffix in RAWS if suffix in given]:
        found.append(
            f"A camera's raw files ({', '.join(raws)}) become photographs in a raw converter, such as that of the "
            "camera's maker: export them as TIFF or PNG, all with the same settings."
        )
    return " ".join(found)


def to_learn_from(samples: Iterable[Sample]) -> list[Sample]:
    """The samples without unmarked views of defective parts, which may show an unmarked defect, or its shadow, and
    would be learnt as normal."""
    return [sample for sample in samples if not sample.of_defective_part]


class ImageDataset(Dataset[dict[str, Any]]):
    """Samples as tensors.

    An item is a dict: ``image`` float [3, S, S], ``mask`` bool [S, S] (all False for a normal image), ``label``
    (1 = anomalous), ``category``, ``defect``, ``view`` ("" if none), ``path`` and ``index``.

    Reading a missing or corrupted file raises ValueError naming it; `adpretrain.data.checking` finds all of them.
    """

    def __init__(self, samples: Sequence[Sample], preprocess: Preprocess) -> None:
        self.samples, self.preprocess = list(samples), preprocess

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        image = sample.read()
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
    """The sample's mask as bool [S, S], all False without one; several mask files are merged (union).

    Raises ValueError if a mask's size differs from the image's: one of the two files is the wrong one.
    """
    if not sample.mask_files:
        return torch.zeros(preprocess.image_size, preprocess.image_size, dtype=torch.bool)
    merged: Image.Image | None = None
    for file in sample.mask_files:
        mask = read_mask(file)
        check_size(file, mask, sample.image, image_size)
        merged = mask if merged is None else ImageChops.lighter(merged, mask)
    assert merged is not None
    return preprocess.mask(merged)


def check_size(file: Path, mask: Image.Image, image: Path, image_size: tuple[int, int]) -> None:
    """Raise ValueError if a mask read from ``file`` does not have the size (width, height) of its image."""
    if mask.size != image_size:
        raise ValueError(
            f"mask {file} is {mask.size[0]}x{mask.size[1]} but its image {image} is "
            f"{image_size[0]}x{image_size[1]} pixels; they must be of one size"
        )
