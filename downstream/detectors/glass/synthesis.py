"""Local anomalies of GLASS: a foreign texture, half transparent, under a mask of Perlin noise (Chen et al. 2024).

The authors take textures from photographs (DTD), which they turn, mirror and recolour at random; here they are taken
as they are, from any folder. Without a folder they are coloured noise with the product's mean colours [ours].

Shapes: B images, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adpretrain.data.samples import is_image
from adpretrain.photographs import read_image
from adpretrain.preprocess import Preprocess
from downstream.detectors.refined.simulation import Simulated, coloured_noise, gradient_noise
from downstream.roi import RegionOfInterest

SCALES = 6  # the noise has 1, 2, .. or 2^5 cells along each side
ABOVE = 0.5  # a pixel is marked where the noise is higher
TRIES = 100  # masks that are drawn until one is not empty
CELLS = 16  # of coloured noise, at most


@dataclass(frozen=True)
class Textures:
    """Photographs of textures, prepared as the images are; without files, coloured noise."""

    files: Sequence[Path] = ()
    preprocess: Preprocess | None = None

    @classmethod
    def of(cls, folder: str | None, preprocess: Preprocess | None) -> Textures:
        """All photographs in a folder and its subfolders. Raises ValueError if there are none, or if it is not known
        how photographs are prepared."""
        if folder is None:
            return cls()
        files = sorted(path for path in Path(folder).rglob("*") if is_image(path))
        if not files:
            raise ValueError(f"no photographs of textures in {folder}: name a folder that holds some, or give none")
        if preprocess is None:
            raise ValueError(
                f"textures {folder} cannot be read: only a Backbone or an ADExtractor says how photographs are "
                "prepared; leave textures out"
            )
        return cls(files, preprocess)

    def draw(self, image: Tensor, rng: np.random.Generator, inside: Tensor | None = None) -> Tensor:
        """A texture [3, S, S] for an image, of which only the pixels ``inside`` are seen. Raises ValueError if textures
        are prepared to another size."""
        if self.preprocess is None:
            return coloured_noise(image, rng, CELLS, inside)
        texture = self.preprocess(read_image(self.files[int(rng.integers(len(self.files)))]))
        if texture.shape != image.shape:
            raise ValueError(f"textures are {tuple(texture.shape)} but images {tuple(image.shape)}: prepare them alike")
        return texture.to(image)


def perlin_mask(size: int, rng: np.random.Generator) -> Tensor:
    """One mask of noise, or the union or the intersection of two, each with the same probability: bool [S, S]."""
    first, kind = _marked(size, rng), int(rng.integers(3))
    if kind == 0:
        return first
    return first | _marked(size, rng) if kind == 1 else first & _marked(size, rng)


def _marked(size: int, rng: np.random.Generator) -> Tensor:
    rows, columns = (2 ** int(power) for power in rng.integers(0, SCALES, 2))
    return gradient_noise(size, (rows, columns), rng, angle=float(rng.uniform(-np.pi / 2, np.pi / 2))) > ABOVE


def pasted(
    images: Tensor, keys: Sequence[Sequence[int]], textures: Textures, region: RegionOfInterest | None = None
) -> Simulated:
    """Paste a texture into every image [B, 3, S, S]: image <- b * image + (1 - b) * texture under the mask, with b
    normal around 0.5 with deviation 0.1, clipped to 0.2..0.8.

    All randomness of an image derives from its key, integers such as (seed, step, number). The mask lies in the region
    of interest; if none of `TRIES` does, it is empty.
    """
    pairs = []
    for number, (image, key) in enumerate(zip(images, keys, strict=True)):
        rng = np.random.default_rng(list(key))
        inside = None if region is None else region.pixels[0 if region.shared else number].to(image.device)
        for _ in range(TRIES):
            mask = perlin_mask(image.shape[-1], rng).to(image.device)
            mask = mask if inside is None else mask & inside
            if bool(mask.any()):
                break
        keep = float(np.clip(rng.normal(0.5, 0.1), 0.2, 0.8))
        if bool(mask.any()):
            image = torch.where(mask, torch.lerp(textures.draw(image, rng, inside), image, keep), image)
        pairs.append((image, mask))
    return Simulated(torch.stack([image for image, _ in pairs]), torch.stack([mask for _, mask in pairs]))
