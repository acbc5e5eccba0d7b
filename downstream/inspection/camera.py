"""One photograph from a camera, in any form that a program holds it, and the verdict on it.

`downstream.inspection.inspector.Inspector` is called with a photograph and gives a `Verdict`. Colours are in the order
red, green, blue: OpenCV has them in the order blue, green, red, so give ``frame[..., ::-1]``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from adpretrain.photographs import OVERSHOOT, as_rgb, to_8_bit
from downstream.inspection.photos import Photo, PhotoReader, Unreadable, prepare_photo, printable
from downstream.inspection.results import UNREADABLE, Result, as_dict
from downstream.regions import Box, Region
from downstream.visualise import ColourScale, numbered, overlay, panel

Picture: TypeAlias = str | os.PathLike[str] | Image.Image | NDArray[Any] | Tensor
EXPECTED = (
    "expected a path, a PIL image, a numpy array [H, W] or [H, W, 3 or 4] or a torch tensor [H, W] or [3 or 4, H, W], "
    "of uint8, uint16 or floats"
)
WITHOUT_A_NAME = Path("the photograph")  # as the subject of a reason


@dataclass(frozen=True, eq=False)
class Drawn:
    """What the heatmap of a scored photograph is drawn from."""

    photo: Image.Image  # the whole photograph, RGB
    reader: PhotoReader
    map_HW: NDArray[np.floating]
    scale: ColourScale

    @property
    def box(self) -> Box:
        """The region that the network sees, in pixels of the photograph."""
        return self.reader.preprocess.seen(self.photo.size)


@dataclass(frozen=True, eq=False)
class Verdict:
    """The verdict on one photograph. ``regions``: the places above the inspector's `pixel_limit`, the highest first."""

    result: Result
    regions: tuple[Region, ...] = ()
    drawn: Drawn | None = None  # None if the photograph could not be scored

    @classmethod
    def unreadable(cls, name: str, reason: str) -> Verdict:
        """The verdict on a photograph that cannot be scored."""
        return cls(Result(name, None, None, UNREADABLE, reason=reason))

    @property
    def score(self) -> float | None:
        """How unusual the most unusual places are, in the unit of the detector; None if unreadable."""
        return self.result.score

    @property
    def p_value(self) -> float | None:
        """The conformal p-value of the score; None if unreadable, or if there is a single normal photograph."""
        return self.result.p_value

    @property
    def verdict(self) -> str:
        """anomalous, normal, undecided (no threshold, or a copy of a normal photograph) or unreadable."""
        return self.result.verdict

    @property
    def reason(self) -> str:
        """Why the photograph is anomalous, undecided or unreadable."""
        return self.result.reason

    @cached_property
    def heatmap(self) -> Image.Image | None:
        """The heatmap over the region that the network sees, RGB, with numbered boxes around the regions; None if
        unreadable. It is drawn when it is first asked for, because drawing takes about as long as scoring."""
        if self.drawn is None:
            return None
        drawn = self.drawn
        heat = overlay(drawn.reader.to_show(drawn.photo), drawn.map_HW, drawn.scale)
        return numbered(heat, self.regions, drawn.box)

    def panel(self) -> Image.Image | None:
        """Photograph and heatmap side by side, as `adpretrain score` saves them; None if unreadable."""
        if self.drawn is None:
            return None
        shown, drawn = self.drawn.reader.to_show(self.drawn.photo), self.drawn
        title = self.result.title
        return panel(shown, drawn.map_HW, drawn.scale, title=title, regions=self.regions, seen=drawn.box)

    def as_dict(self) -> dict[str, Any]:
        """The verdict as a dict for JSON: the numbers of `Result`, and ``regions`` in pixels of the photograph."""
        found = as_dict(self.result)
        del found["heatmap"]
        return found | {"regions": [_numbers(region) for region in self.regions]}


def _numbers(region: Region) -> dict[str, Any]:
    return {
        "box": list(region.box),
        "area_px": region.area,
        "area_mm2": region.area_mm2,
        "peak": region.peak,
        "mean": region.mean,
        "peak_at": list(region.peak_at),
    }


def take(image: Picture, reader: PhotoReader, name: str = "") -> Photo | Unreadable:
    """Read a photograph, or prepare one that is in memory, as the inspector's other photographs were.

    Raises ValueError for what is no photograph: another type, shape or kind of number.
    """
    if isinstance(image, str | os.PathLike):
        held, path = None, Path(image)
    else:
        held, path = image if isinstance(image, Image.Image) else _array(image), Path(name) if name else WITHOUT_A_NAME
    try:
        photo = reader.open(path) if held is None else _rgb(held, reader.full_scale)
        roi = reader.roi.of(path, photo.size)
        return prepare_photo(path, photo, reader.preprocess, reader.tiled, roi, shown=photo)
    except (ValueError, OSError) as error:
        return Unreadable(path, printable(error))


def _rgb(held: Image.Image | NDArray[Any], full_scale: float | None) -> Image.Image:
    if 0 in (held.size if isinstance(held, Image.Image) else held.shape):
        raise ValueError("it has no pixels")
    return as_rgb(_upright(held) if isinstance(held, Image.Image) else _picture(held), full_scale)


def _upright(image: Image.Image) -> Image.Image:
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:  # an image that was opened is decoded here; see adpretrain.photographs
        raise ValueError(f"cannot read this image: {error or type(error).__name__}") from error


def _array(image: NDArray[Any] | Tensor) -> NDArray[Any]:
    """Return values [H, W] or [H, W, 3 or 4] of uint8, uint16 or float32. Raises ValueError for anything else."""
    if isinstance(image, Tensor):
        held = image.detach().cpu()
        array = (held.float() if held.is_floating_point() else held).numpy()
        array = array.transpose(1, 2, 0) if array.ndim == 3 else array
    elif isinstance(image, np.ndarray):
        array = image
    else:
        raise ValueError(f"a photograph of type {type(image).__name__}; {EXPECTED}")
    kind = "float32" if array.dtype.kind == "f" else array.dtype.name
    if kind not in ("uint8", "uint16", "float32"):
        raise ValueError(f"a photograph of {array.dtype} numbers; {EXPECTED}")
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise ValueError(f"a photograph of shape {tuple(image.shape)}; {EXPECTED}")
    return np.ascontiguousarray(array, dtype=kind)


def _picture(values: NDArray[Any]) -> Image.Image:
    """Values of `_array` as a picture; those in colour become 8-bit as a file's would."""
    if values.ndim == 2 or values.dtype == np.uint8:
        return Image.fromarray(values)
    if values.dtype == np.uint16:
        return Image.fromarray((values >> 8).astype(np.uint8))  # Pillow reads colour files of 16 bits so
    # All channels have one scale, chosen as `to_8_bit` does for gray floats.
    scale = 1.0 if values.max() <= OVERSHOOT else 255.0
    bands = [to_8_bit(Image.fromarray(np.ascontiguousarray(band)), scale) for band in np.moveaxis(values, 2, 0)]
    merged = Image.merge("RGBA" if len(bands) == 4 else "RGB", bands)
    merged.info["saturated"] = any(band.info["saturated"] for band in bands)
    return merged
