"""Simulate defects in normal images, with masks, to train a refinement network (ReConPatch suppl. D.2).

A smooth random field chooses a region, in which other content is blended in: for *structural* defects shuffled patches
of the same image (like a misplaced or broken part), for *textural* ones a foreign texture.

Where the supplement leaves a choice open [ours]: the field is gradient noise with a random number of cells along each
side, and its highest values are marked, so that the marked share of an image is drawn explicitly; a marked pixel that
hardly changes keeps its old value and is not marked; the foreground is not detected. The supplement takes textures from
a dataset of photographs (DTD); any images can be given instead, and without any the textures are coloured noise.

Shapes: B images, S side in pixels, T textures, G cells per side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

KINDS = ("structural", "textural")


@dataclass(frozen=True)
class SimulationConfig:
    """Options of the simulated defects.

    Args:
        kind: "structural" (the best in the supplement, Table S7) or "textural".
        normal_share: share of images that are not changed and have an empty mask.
        smallest_area, largest_area: bounds of the marked share of an image, whose logarithm is drawn uniformly.
        smallest_opacity: smallest opacity of the new content, which is drawn uniformly between this and 1.
        cells: largest G of the field; G is a power of two drawn between 2 and this.
        grid: the image is cut into grid x grid patches, which are shuffled.
        visible: a pixel counts as changed if one of its channels changes by at least this, in the unit of the images.
    """

    kind: Literal["structural", "textural"] = "structural"
    normal_share: float = 0.5
    smallest_area: float = 0.002
    largest_area: float = 0.1
    smallest_opacity: float = 0.3
    cells: int = 16
    grid: int = 8
    visible: float = 0.05

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is unknown; choose one of {', '.join(KINDS)}")
        for name in ("normal_share", "smallest_opacity"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must be in 0..1")
        if not 0 < self.smallest_area <= self.largest_area <= 1:
            raise ValueError(f"areas {self.smallest_area} to {self.largest_area} must be shares in (0, 1], ascending")
        if self.cells < 2 or self.grid < 2 or self.visible <= 0:
            raise ValueError(
                f"cells {self.cells} and grid {self.grid} must be at least 2, visible {self.visible} positive"
            )


DEFAULT = SimulationConfig()


@dataclass(frozen=True)
class Simulated:
    """``images`` [B, 3, S, S] and bool ``masks`` [B, S, S], which are True exactly where a pixel was changed."""

    images: Tensor
    masks: Tensor


def simulate(
    images: Tensor,
    keys: Sequence[Sequence[int]],
    config: SimulationConfig = DEFAULT,
    textures: Tensor | None = None,
) -> Simulated:
    """Simulate defects in copies of normal images [B, 3, S, S].

    ``keys`` are B lists of integers, such as (seed, epoch, index); all randomness of image b derives from keys[b],
    whatever the batch or the device. ``textures`` [T, 3, S, S], normalised like the images, are used for "textural".
    Raises ValueError if keys or textures do not fit the images.
    """
    if len(images) == 0:
        raise ValueError("no images to make defects in: give a batch [B, 3, S, S] with B > 0")
    if len(keys) != len(images):
        raise ValueError(f"{len(keys)} keys for {len(images)} images; give one for each")
    if textures is not None and (len(textures) == 0 or textures.shape[1:] != images.shape[1:]):
        raise ValueError(
            f"textures {tuple(textures.shape)} do not fit images {tuple(images.shape)}: prepare them alike"
        )
    pairs = [_simulate(image, key, config, textures) for image, key in zip(images, keys, strict=True)]
    return Simulated(torch.stack([image for image, _ in pairs]), torch.stack([mask for _, mask in pairs]))


def _simulate(
    image: Tensor, key: Sequence[int], config: SimulationConfig, textures: Tensor | None
) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(list(key))
    size = image.shape[-1]
    if rng.random() < config.normal_share:
        return image, torch.zeros(size, size, dtype=torch.bool, device=image.device)
    where = random_region(size, rng, config).to(image.device)
    if config.kind == "structural":
        source = shuffled(image, config.grid, rng)
    elif textures is not None:
        source = textures[int(rng.integers(len(textures)))].to(image.device, image.dtype)
    else:
        source = coloured_noise(image, rng, config.cells)
    changed = torch.lerp(image, source, float(rng.uniform(config.smallest_opacity, 1)))
    mask = where & ((changed - image).abs().amax(0) >= config.visible)
    return torch.where(mask, changed, image), mask


def random_region(size: int, rng: np.random.Generator, config: SimulationConfig = DEFAULT) -> Tensor:
    """Draw the region of a defect: bool [S, S], the pixels with the highest values of a random field."""
    field = gradient_noise(size, _cells(rng, config.cells), rng, angle=float(rng.uniform(0, math.pi)))
    area = math.exp(rng.uniform(math.log(config.smallest_area), math.log(config.largest_area)))
    pixels = max(1, round(area * size * size))
    region = torch.zeros(size * size, dtype=torch.bool)
    region[field.flatten().topk(pixels).indices] = True
    return region.view(size, size)


def _cells(rng: np.random.Generator, most: int) -> tuple[int, int]:
    """Draw the cells along both directions: independent powers of two, which give scratches as well as spots."""
    powers = int(math.log2(most))
    return 2 ** int(rng.integers(1, powers + 1)), 2 ** int(rng.integers(1, powers + 1))


def gradient_noise(size: int, cells: tuple[int, int], rng: np.random.Generator, angle: float = 0.0) -> Tensor:
    """Draw smooth noise of G_y x G_x cells rotated by ``angle`` (radians), about -1 to 1: float32 [S, S].

    As in Perlin 2002, the noise is 0 at each corner of a cell, with a random slope; the four slopes are blended by
    6 t^5 - 15 t^4 + 10 t^3.
    """
    place = (torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5
    turned_y = math.cos(angle) * place[:, None] + math.sin(angle) * place[None]
    turned_x = math.cos(angle) * place[None] - math.sin(angle) * place[:, None]
    place_y, place_x = (turned_y + 1) * cells[0], (turned_x + 1) * cells[1]  # a rotated square extends to 0.71
    corner_y, corner_x = place_y.long(), place_x.long()
    offset_y, offset_x = place_y - corner_y, place_x - corner_x
    slope = torch.from_numpy(rng.uniform(0, 2 * math.pi, (2 * cells[0] + 1, 2 * cells[1] + 1)))
    blend_y, blend_x = (t**3 * (t * (6 * t - 15) + 10) for t in (offset_y, offset_x))

    def height(down: int, right: int) -> Tensor:
        direction = slope[corner_y + down, corner_x + right]
        return direction.sin() * (offset_y - down) + direction.cos() * (offset_x - right)

    upper = torch.lerp(height(0, 0), height(0, 1), blend_x)
    lower = torch.lerp(height(1, 0), height(1, 1), blend_x)
    return (math.sqrt(2) * torch.lerp(upper, lower, blend_y)).float()


def shuffled(image: Tensor, grid: int, rng: np.random.Generator) -> Tensor:
    """Shuffle grid x grid patches of an image [3, S, S]. Patches cut off at the border wrap around."""
    size = image.shape[-1]
    side = math.ceil(size / grid)
    count = math.ceil(size / side)
    order = torch.from_numpy(rng.permutation(count * count)).view(count, count)
    place = torch.arange(size)
    source = order[place[:, None] // side, place[None] // side]
    rows = (source // count * side + (place % side)[:, None]) % size
    columns = (source % count * side + (place % side)[None]) % size
    return image[:, rows.to(image.device), columns.to(image.device)]


def coloured_noise(image: Tensor, rng: np.random.Generator, cells: int, inside: Tensor | None = None) -> Tensor:
    """Draw gradient noise [3, S, S] per channel, with the mean colours of the image and twice its contrast; of its
    pixels ``inside``, bool [S, S], if these are given."""
    size = image.shape[-1]
    seen = image if inside is None else image[:, inside][:, None]
    noise = torch.stack([gradient_noise(size, _cells(rng, cells), rng) for _ in range(len(image))])
    noise = (noise / noise.std(dim=(1, 2), keepdim=True)).to(image.device, image.dtype)
    return seen.mean((1, 2), keepdim=True) + 2 * seen.std(dim=(1, 2), keepdim=True) * noise
