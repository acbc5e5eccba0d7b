"""Defects that lie on the surface or discolour it: scratches, stains, fibres, streaks."""

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from products.fields import (
    Array,
    field,
    loguniform,
    spectrum,
)
from products.shapes import blob, branches, course, paint_lines, strokes, toward
from products.sites import Site, blob_at, target_of


def scratch(image: Array, part: Array, site: Site, rng: Generator) -> Array:
    """One to four thin lines, sometimes with a ridge of the other sign beside them."""
    size, k = part.shape[0], part.shape[0] / 256
    width = loguniform(rng, 0.9, 3.0) * k
    line = strokes(size, site.y, site.x, 5 * site.radius + 8 * k, width, rng, count=int(rng.integers(1, 5)))
    strength = min(0.95, site.strength * 1.6)
    if rng.random() < 0.4:
        image = toward(
            image, 0.5 * strength * part * np.roll(line, max(1, round(width)), 1), 0.0 if site.bright else 1.0
        )
    return toward(image, strength * part * line, target_of(image, site, rng))


def spot(image: Array, part: Array, site: Site, rng: Generator) -> Array:
    """A compact spot with a fairly sharp edge."""
    alpha = blob_at(part, site, rng, softness=rng.uniform(0.1, 0.8), rough=0.15, scale=0.5)
    return toward(image, min(0.95, 1.5 * site.strength) * alpha, target_of(image, site, rng))


def crack(image: Array, part: Array, site: Site, rng: Generator) -> Array:
    """A dark (rarely light) jagged branching line with a faint bright lip."""
    size, k = part.shape[0], part.shape[0] / 256
    line = branches(size, site.y, site.x, 4 * site.radius + 12 * k, loguniform(rng, 0.9, 3.5) * k, rng) * part
    strength = min(0.95, 1.6 * site.strength)
    lip = np.roll(line, (1, 1), (0, 1)) * (1 - line)
    target = 1.0 if site.bright and rng.random() < 0.3 else rng.uniform(0, 0.15)
    return toward(toward(image, 0.3 * strength * lip, 1 - round(target)), strength * line, target)


def stain(image: Array, part: Array, site: Site, rng: Generator) -> Array:
    """A soft translucent blot, dried to a darker rim or not."""
    alpha = blob_at(part, site, rng, softness=rng.uniform(0.3, 1.2), rough=0.35)
    if rng.random() < 0.4:
        alpha = 0.45 * alpha + 2.2 * alpha * (1 - alpha)
    return toward(image, np.minimum(site.strength * alpha, 0.95), target_of(image, site, rng))


def streak(image: Array, part: Array, site: Site, rng: Generator) -> Array:
    """A long narrow band of other brightness, nearly straight, with soft ends."""
    size = part.shape[0]
    path = course(site.y, site.x, rng.uniform(0.25, 1.2) * size, rng, bend=0.08)
    width = loguniform(rng, 2, 14) * size / 256
    line = ndimage.uniform_filter(paint_lines(size, [(path, width)]), max(2, round(0.4 * width)))
    texture = 1 + 0.4 * field(spectrum(size, 6, slope=0.5), rng)
    return toward(image, np.clip(0.8 * site.strength * line * part * texture, 0, 0.95), target_of(image, site, rng))


def fibre(image: Array, part: Array, site: Site, rng: Generator) -> Array:
    """A hair, thread or lint lying on top: a curled line of one colour with its shadow."""
    size, k = part.shape[0], part.shape[0] / 256
    path = course(site.y, site.x, 4 * site.radius + 20 * k, rng, bend=rng.uniform(1, 6))
    line = paint_lines(size, [(path, loguniform(rng, 1, 3) * k)])
    strength = min(0.95, 1.7 * site.strength)
    shadow = np.roll(line, (int(2 * k), int(2 * k)), (0, 1))
    return toward(toward(image, 0.35 * strength * shadow, 0.0), strength * line, target_of(image, site, rng))


def specks(image: Array, part: Array, site: Site, rng: Generator) -> Array:
    """A cluster of small particles, droplets or pores."""
    size = part.shape[0]
    alpha = np.zeros((size, size), np.float32)
    for _ in range(rng.integers(4, 25)):
        y, x = rng.normal((site.y, site.x), 0.6 * site.radius + 3)
        if 0 <= y < size and 0 <= x < size:
            np.maximum(alpha, blob(size, y, x, loguniform(rng, 1.2, 4.5) * size / 256, rng, softness=0.5), out=alpha)
    return toward(image, min(0.95, 1.5 * site.strength) * alpha * part, target_of(image, site, rng))


def uneven(image: Array, part: Array, site: Site, rng: Generator) -> Array:
    """Uneven grinding or coating: a wide soft region of other brightness and other fine streaks."""
    size = part.shape[0]
    radius = max(2.0 * site.radius, 28 * size / 256)
    alpha = part * blob(
        size,
        site.y,
        site.x,
        min(radius, 0.4 * size),
        rng,
        softness=rng.uniform(0.4, 1.5),
        rough=0.35,
        aspect=4,
    )
    angle, stretch = rng.choice([0, np.pi / 2]), loguniform(rng, 1, 40)
    lines = field(spectrum(size, loguniform(rng, 1.2, 8), slope=0.3, angle=float(angle), stretch=stretch), rng)
    gain = (1 if site.bright else -1) * rng.uniform(0.1, 0.4) * (0.6 + site.strength)
    return image * (1 + alpha * (np.float32(gain) + np.float32(rng.uniform(0, 0.12)) * lines))[..., None]
