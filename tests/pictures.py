"""Small photographs and masks for the tests of data sets."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (12, 8)  # width, height


def photograph(path: Path, seed: int | None = None) -> Path:
    """Noise, another for every name below its set's folders, or for every seed."""
    seed = zlib.crc32("/".join(path.parts[-5:]).encode()) if seed is None else seed
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def mask(path: Path, box: tuple[int, int, int, int] = (0, 0, 4, 4), value: int = 255) -> Path:
    """A mask marked in ``box`` (left, upper, right, lower)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    marked = Image.new("L", SIZE, 0)
    marked.paste(value, box)
    marked.save(path)
    return path


def write(path: Path, mode: str = "RGB", value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 8), value).save(path)
    return path
