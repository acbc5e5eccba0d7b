"""Drawn sample photographs: a capsule, good and damaged, for a first look without photographs of one's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from adpretrain.data.synthetic import Rendering, make_product, render

SEED, PRODUCT, SIZE = 7, 4, 256
GOOD = range(8)
NEW = ((20, None), (21, "missing"), (22, None), (23, "specks"), (24, "crack"), (25, None), (26, "spot"), (27, "break"))


def draw_samples(folder: Path) -> tuple[list[Path], list[Path]]:
    """Write the good and the new photographs below ``folder``; the same ones every time."""
    product = make_product(PRODUCT, SEED, SIZE)
    folder.mkdir(parents=True, exist_ok=True)
    good = [_save(folder / f"good_{number + 1}.png", render(product, sample)) for number, sample in enumerate(GOOD)]
    new = [
        _save(folder / f"part_{number + 1}_{family or 'good'}.png", render(product, sample, family=family))
        for number, (sample, family) in enumerate(NEW)
    ]
    return good, new


def _save(path: Path, shot: Rendering) -> Path:
    pixels = np.rint(np.clip(shot.image, 0, 1) * 255).astype(np.uint8)
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path)
    return path
