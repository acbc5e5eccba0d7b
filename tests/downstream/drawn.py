"""Tiles, and noise as photographs for detectors on the raw backbone Lite0 (fixture `backbone`)."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIZE = 64
SMALL_UNIAD = {
    "grid": 8,
    "neighbours": 3,
    "width": 32,
    "heads": 4,
    "layers": 2,
    "inner": 64,
    "learning_rate": 2e-3,
}  # learns tiles in seconds


def photographs(count: int, seed: int) -> Tensor:
    """[count, 3, S, S], the same for the same seed."""
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def tile(seed: int, blob: bool = False, size: int = 96) -> Image.Image:
    """A gray-brown tile with fine noise; with `blob`, a dark disc that no good tile has."""
    rng = np.random.default_rng(seed)
    stripes = 12 * np.sin(np.arange(size) / 3.0)[None, :, None]
    pixels = np.array([150, 130, 110]) + stripes + rng.normal(0, 6, (size, size, 3))
    if blob:
        ys, xs = np.mgrid[:size, :size]
        centre = rng.integers(size // 3, 2 * size // 3, size=2)
        pixels[(ys - centre[0]) ** 2 + (xs - centre[1]) ** 2 < (size // 8) ** 2] = 10
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def wavy(count: int, seed: int, defect: float = 0.0) -> Tensor:
    """[count, 3, S, S]: waves at any phase under a light that changes much; a defect is a square of fine stripes."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0, 12, SIZE)
    light = 0.3 + 0.7 * torch.rand(count, 3, 1, 1, generator=generator)
    phase = 6 * torch.rand(count, 1, 1, generator=generator)
    product = 0.5 + 0.3 * (ramp[None, :, None] + phase).sin() * (ramp[None, None] / 2 + phase).cos()
    images = light * product[:, None] + 0.03 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    images[:, :, 24:40, 24:40] += defect * (3 * torch.arange(16.0)).sin()
    return images
