"""Light and camera: how a surface [S, S, C] of albedo becomes a photograph.

A product has one rig (fixed in make_rig); every shot departs a little from it, or a lot where the rig drifts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.random import Generator

from products.fields import Array, grid, loguniform

Box = tuple[slice, slice]
Develop = Callable[[Array, Box], Array]
"""(surface [S, S, C], box) -> photograph of the box in 0..1: the same light, blur and noise at every call."""
BRIGHTEST = 0.72
"""Mean exposure above which a camera's automatic shutter steps in."""


@dataclass(frozen=True)
class Rig:
    """Light and camera of one product."""

    drift: float  # standard deviation of log brightness between shots
    slope: float  # strength of the brightness gradient
    direction: float  # its direction in radians
    vignette: float  # loss of brightness in the corners
    glare: float  # peak of the specular highlights, 0 = none
    glare_width: float  # in half image sides
    warmth: float  # red against blue
    curve: float  # tone curve: raises (> 0) or lowers the mid tones
    blur: float  # px at 256
    noise: float  # standard deviation
    quality: int  # JPEG


def make_rig(rng: Generator) -> Rig:
    return Rig(
        drift=float(rng.choice([0.03, 0.12, 0.35], p=[0.4, 0.35, 0.25])),
        slope=rng.uniform(0, 0.3),
        direction=rng.uniform(0, 2 * np.pi),
        vignette=float(rng.choice([0, rng.uniform(0, 0.4)])),
        glare=float(rng.choice([0, rng.uniform(0.05, 0.45)], p=[0.6, 0.4])),
        glare_width=rng.uniform(0.15, 0.7),
        warmth=rng.normal(0, 0.05),
        curve=rng.uniform(-0.35, 0.35),
        blur=rng.uniform(0.0, 1.0),
        noise=loguniform(rng, 0.003, 0.02),
        quality=int(rng.integers(88, 97)),
    )


def _soften(image: Array, weight: float) -> Array:
    """A three-tap blur along both axes; `weight` is the share of each neighbour."""
    for axis in (0, 1):
        padded = np.pad(image, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
        low, high = (padded[:-2], padded[2:]) if axis == 0 else (padded[:, :-2], padded[:, 2:])
        image = image + np.float32(weight) * (low + high - 2 * image)
    return image


@lru_cache(maxsize=2)
def _sensor(size: int) -> Array:
    """Unit noise [2 S, 2 S, 3] that shots take windows of: fresh noise would cost as much as the rest."""
    return np.random.default_rng(0).standard_normal((2 * size, 2 * size, 3), dtype=np.float32)


def set_up(rig: Rig, surface: Array, view: int, rng: Generator) -> Develop:
    """Draw light, blur and noise of one shot from view number `view` (0 = frontal); returns how it develops.

    `surface` is the defect-free one: a defect does not change the exposure.
    """
    size, _, channels = surface.shape
    x, y = grid(size)
    direction = rig.direction + view * 1.3 + rng.normal(0, 0.3)
    slope = (rig.slope + 0.06 * view) * rng.uniform(0.5, 1.3)
    gain = np.exp(rng.normal(-0.04 * view, rig.drift)) * (
        1 + np.float32(slope * np.cos(direction)) * x + np.float32(slope * np.sin(direction)) * y
    )
    gain = gain * (1 - np.float32(rig.vignette / 2) * (x * x + y * y))
    cast = np.array([1 + rig.warmth, 1, 1 - rig.warmth])[:channels] if channels == 3 else np.ones(1)
    gain *= min(1.0, BRIGHTEST / float((surface[::4, ::4].mean(-1) * gain[::4, ::4]).mean()))
    light = (np.clip(gain, 0.15, 2.2)[..., None] * cast).astype(np.float32)
    glare = np.zeros((size, size, 1), np.float32)
    if rig.glare:
        for _ in range(rng.integers(1, 3)):
            cx, cy = rng.normal(0, 0.7, 2)
            wide, high = rig.glare_width * rng.uniform(0.3, 1.5, 2)
            spot = np.exp(
                -(((x - np.float32(cx)) / np.float32(wide)) ** 2) - ((y - np.float32(cy)) / np.float32(high)) ** 2
            )
            glare[..., 0] += np.float32(rig.glare * rng.uniform(0.3, 1)) * spot
    weight = min(0.25, 0.5 * (rig.blur * size / 256 * rng.uniform(0.6, 1.2)) ** 2)
    top, left = rng.integers(0, size, 2)
    noise = _sensor(size)[top : top + size, left : left + size, :channels] * np.float32(rig.noise)
    curve = np.float32(rig.curve + rng.normal(0, 0.03))
    if rig.glare:
        light *= 1 + 2 * glare
    glare *= 0.5

    def develop(surface: Array, box: Box) -> Array:
        exposed = np.clip(surface[box], 0, 1.2) * light[box] + glare[box]
        # Film-like shoulder above 0.8: highlights fade into white instead of clipping to flat patches.
        over = np.maximum(exposed - np.float32(0.8), 0)
        exposed += over / (1 + 2.5 * over) - over
        exposed += curve * exposed * (1 - exposed)
        return np.clip(_soften(exposed, weight) + noise[box], 0, 1)

    return develop
