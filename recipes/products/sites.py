"""Where a defect sits: a point on the part or its rim, a size, a strength, and what it is made of."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from products.fields import (
    Array,
    loguniform,
    random_colour,
)
from products.shapes import blob


@dataclass(frozen=True)
class Site:
    """Where, how large and how strong a defect is."""

    y: float  # px
    x: float
    radius: float  # px, about half the extent
    strength: float  # 0..1, opacity
    bright: bool  # sign of the contrast


def choose_site(part: Array, rng: Generator, boost: float) -> Site:
    """A site on the part; size (specks to a third of the image) and strength log-uniform, times `boost`."""
    size = part.shape[0]
    y, x = rng.integers(0, size, (2, 64))
    on_part = np.flatnonzero(part[y, x] > 0.9)
    pick = on_part[0] if len(on_part) else int(part[y, x].argmax())
    radius = loguniform(rng, 2.5, 60) * size / 256
    # The eye (and a camera) finds a faint large mark as easily as a strong small one.
    strength = loguniform(rng, 0.15, 1.4) * (6 * size / 256 / radius) ** 0.25 * boost
    return Site(float(y[pick]), float(x[pick]), radius, float(np.clip(strength, 0.1, 0.95)), bool(rng.random() < 0.42))


def target_of(image: Array, site: Site, rng: Generator) -> Array:
    """The colour [C] a mark fades to: nearly white or nearly black, sometimes tinted."""
    value = rng.uniform(0.8, 1.1) if site.bright else rng.uniform(0.0, 0.12)
    if image.shape[-1] == 1:
        return np.array([value], np.float32)
    return random_colour(rng, value if rng.random() < 0.7 else rng.uniform(0.1, 0.8), rng.choice([0.1, 0.7]))


def blob_at(part: Array, site: Site, rng: Generator, softness: float, rough: float = 0.25, scale: float = 1.0) -> Array:
    return part * blob(part.shape[0], site.y, site.x, site.radius * scale, rng, softness=softness, rough=rough)


def rim_site(part: Array, site: Site) -> Site:
    """The same site moved to the nearest rim of the part, or of the image where the part fills it."""
    size = part.shape[0]
    framed = np.pad(part[::2, ::2] > 0.5, 1)
    rim = framed & ~ndimage.binary_erosion(framed)
    rows, columns = np.nonzero(rim)
    if not len(rows):
        return site
    nearest = int(np.argmin((rows * 2 - site.y) ** 2 + (columns * 2 - site.x) ** 2))
    y, x = np.clip([2.0 * rows[nearest] - 2, 2.0 * columns[nearest] - 2], 0, size - 1)
    return Site(float(y), float(x), site.radius, site.strength, site.bright)


def behind(image: Array, part: Array, rng: Generator) -> Array:
    """The background colour [C], or a dark one where the part hides it."""
    outside = image[part < 0.05]
    return outside.mean(0) if len(outside) > 50 else np.full(image.shape[-1], rng.uniform(0, 0.1), np.float32)
