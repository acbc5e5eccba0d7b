"""Gray pictures of more than 8 bits, and the full scale that makes 8 bits of them.

A file says how wide its numbers are, not how far the camera counts: 10 and 12 bits come in 16-bit files.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

INTEGER_SCALES = (255.0, 1023.0, 4095.0, 16383.0, 65535.0)  # of 8, 10, 12, 14 and 16 bits
FLOAT_SCALES = (1.0, *INTEGER_SCALES)
OVERSHOOT = 1.25  # of a float picture's full scale: filters and interpolation exceed it at edges


def is_deep(image: Image.Image) -> bool:
    """Whether a picture has more than 8 bits, which Pillow keeps of gray ones only."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def values_of(image: Image.Image) -> NDArray[np.float32]:
    """Its values as they are. Raises ValueError for NaN."""
    values = np.asarray(image, dtype=np.float32)
    if np.isnan(values).any():
        raise ValueError("it holds NaN")
    return values


def to_8_bit(image: Image.Image, full_scale: float | None = None) -> Image.Image:
    """Map 16-bit, 32-bit and float gray images to 8 bit; ``full_scale`` becomes 255.

    By default it is their type's: 65535, and of floats 1 or 255. The range is fixed, never the image's own minimum and
    maximum: stretching each photograph by itself would hide brightness differences between a part and its references.
    ``info["saturated"]`` of the result says whether values lay above it.
    """
    if not is_deep(image):
        return image
    values = values_of(image)
    top = float(values.max(initial=0.0))
    if full_scale is None:
        full_scale = 65535.0 if image.mode != "F" else 1.0 if top <= OVERSHOOT else 255.0
    mapped = Image.fromarray(np.clip(np.rint(values * (255.0 / full_scale)), 0, 255).astype(np.uint8))
    mapped.info["saturated"] = top > full_scale * (OVERSHOOT if image.mode == "F" else 1.0)
    return mapped


def full_scale_of(depths: Iterable[tuple[float, bool] | None]) -> float | None:
    """The full scale of one camera's photographs, from their `adpretrain.preprocess.depth`; None if all have 8 bits.

    Cameras write 10 or 12 bits into 16-bit files: the smallest usual full scale (`INTEGER_SCALES`, `FLOAT_SCALES`) that
    holds the highest value of all. Raises ValueError for values above all of them, and for floats beside integers.
    """
    deep = [found for found in depths if found is not None]
    if not deep:
        return None
    if len({is_float for _, is_float in deep}) > 1:
        raise ValueError("some photographs hold floats and others integers of more than 8 bits: save all alike")
    top, is_float = max(deep)
    for scale in FLOAT_SCALES if is_float else INTEGER_SCALES:
        if top <= scale * (OVERSHOOT if is_float else 1.0):
            return scale
    raise ValueError(f"values up to {top:.6g} exceed 16 bits (65535), the highest full scale: rescale the photographs")
