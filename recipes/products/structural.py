"""Defects that change the surface or the shape itself: holes, breaks, dents, foreign or distorted texture."""

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from products.fields import (
    Array,
    field,
    grid,
    loguniform,
    relief,
    smoothstep,
    spectrum,
)
from products.shapes import blob, toward, window
from products.sites import Site, behind, blob_at, rim_site


def blowhole(image: Array, part: Array, site: Site, rng: Generator) -> Array:
    """A pit: dark floor, a lit wall opposite the light and a shaded one towards it."""
    shape = blob_at(part, site, rng, softness=0.5, rough=0.2, scale=0.45)
    floor = toward(image, (0.35 + 0.6 * site.strength) * smoothstep(shape * 2 - 0.7), rng.uniform(0, 0.12))
    wall = relief(-shape, rng.uniform(0, 2 * np.pi)) * np.float32(max(2.0, 0.4 * site.radius) * site.strength)
    return floor * (1 + np.clip(wall, -0.7, 1.2))[..., None]


def missing(image: Array, part: Array, site: Site, rng: Generator) -> Array:
    """A piece is gone: what was behind it shows, flat, with a thin shadow at the edge."""
    size = part.shape[0]
    alpha = blob_at(part, site, rng, softness=0.08, rough=rng.uniform(0.05, 0.4))
    outside = image[part < 0.05]
    if len(outside) > 50 and rng.random() < 0.8:
        ground = outside.mean(0)
    else:
        ground = image[window(size, site.y, site.x, site.radius)].mean((0, 1)) * rng.choice([0.35, 0.6, 1.4])
    shadow = np.clip(np.roll(alpha, (-2, -2), (0, 1)) - alpha, 0, 1)
    return toward(image * (1 - 0.4 * shadow)[..., None], alpha, ground)


def cutpaste(image: Array, part: Array, site: Site, rng: Generator) -> Array:
    """A patch of the same image in a wrong place (CutPaste, Li et al. 2021), perhaps turned, its tone off."""
    size = part.shape[0]
    shift = rng.integers(size // 8, size - size // 8, 2)
    moved = np.roll(image, tuple(shift), (0, 1))
    if rng.random() < 0.5:
        moved = np.swapaxes(moved, 0, 1)
    if rng.random() < 0.5:
        alpha = blob_at(part, site, rng, softness=0.1)
    else:
        x, y = grid(size)
        half_w, half_h = site.radius * np.sqrt([loguniform(rng, 0.4, 2.5), loguniform(rng, 0.4, 2.5)]) * 2 / size
        inside = np.minimum(half_w - np.abs(x - (site.x / size * 2 - 1)), half_h - np.abs(y - (site.y / size * 2 - 1)))
        alpha = part * np.clip(inside * np.float32(size / 2), 0, 1).astype(np.float32)
    tone = 1 + rng.normal(0, 0.15) * site.strength
    return toward(image, alpha, moved * np.float32(tone))


def warp(image: Array, part: Array, site: Site, rng: Generator) -> Array:
    """A local distortion: swirl, bulge, pinch or shove of what is there."""
    size = part.shape[0]
    radius = max(site.radius, 10 * size / 256) * 1.3
    box = window(size, site.y, site.x, radius)
    v, u = np.mgrid[box].astype(np.float32)
    dy, dx = v - np.float32(site.y), u - np.float32(site.x)
    fall = smoothstep(1 - np.hypot(dy, dx) / np.float32(radius)) * part[box]
    kind, push = rng.integers(0, 3), np.float32((0.5 + site.strength) * rng.choice([-1, 1]))
    if kind == 0:
        angle = push * 2 * fall
        sy, sx = dy * np.cos(angle) - dx * np.sin(angle), dy * np.sin(angle) + dx * np.cos(angle)
    elif kind == 1:
        zoom = 1 + 0.6 * push * fall
        sy, sx = dy * zoom, dx * zoom
    else:
        turn = rng.uniform(0, 2 * np.pi)
        sy = dy + np.float32(np.sin(turn) * radius * 0.4) * push * fall
        sx = dx + np.float32(np.cos(turn) * radius * 0.4) * push * fall
    out = image.copy()
    at = (sy + np.float32(site.y), sx + np.float32(site.x))
    for c in range(image.shape[-1]):
        out[..., c][box] = ndimage.map_coordinates(image[..., c], at, order=1, mode="nearest")
    return out


def blur(image: Array, part: Array, site: Site, rng: Generator) -> Array:
    """The texture is smeared away, isotropically or along one axis."""
    size = part.shape[0]
    wide = max(site.radius, 9 * size / 256)
    alpha = part * blob(size, site.y, site.x, wide, rng, softness=rng.uniform(0.2, 0.6))
    sigma = rng.uniform(1.5, 6) * size / 256
    kernel = (
        (sigma, sigma, 0) if rng.random() < 0.6 else (3 * sigma, 0.0, 0) if rng.random() < 0.5 else (0.0, 3 * sigma, 0)
    )
    box = window(size, site.y, site.x, 2.2 * wide + 2)
    smeared = ndimage.gaussian_filter(image[box], kernel, truncate=2.5, mode="nearest")
    out = image.copy()
    out[box] += alpha[box][..., None] * (smeared - image[box])
    return out


def swap(image: Array, part: Array, site: Site, rng: Generator) -> Array:
    """Another material in the same tone: the local texture is replaced by one with a foreign spectrum."""
    size = part.shape[0]
    box = window(size, site.y, site.x, max(8.0, site.radius))
    mean, spread = image[box].mean((0, 1)), float(image[box].std())
    foreign = field(
        spectrum(
            size,
            loguniform(rng, 1, 16),
            band=rng.choice([0, 0.4]),
            slope=rng.uniform(0, 1),
            angle=rng.uniform(0, np.pi),
            stretch=loguniform(rng, 1, 12),
        ),
        rng,
    )
    texture = (
        mean * (1 + rng.normal(0, 0.1)) + (np.clip(spread, 0.03, 0.2) * rng.uniform(0.6, 1.8) * foreign)[..., None]
    )
    return toward(
        image,
        min(0.95, 0.3 + site.strength) * blob_at(part, site, rng, softness=0.15),
        texture.astype(np.float32),
    )


def fray(image: Array, part: Array, site: Site, rng: Generator) -> Array:
    """A ragged edge: many small bites and loose ends along a stretch of the rim."""
    size, at = part.shape[0], rim_site(part, site)
    ragged = field(spectrum(size, loguniform(rng, 6, 20), band=0.5), rng)
    near = blob(size, at.y, at.x, max(at.radius, 8 * size / 256), rng, softness=1.2, rough=0.3)
    bites = part * np.clip((near * 1.6 + 0.45 * ragged - 0.75) * 4, 0, 1) * (near > 0)
    chipped = toward(image, min(0.9, 0.5 + at.strength) * bites, behind(image, part, rng))
    lip = np.clip(np.roll(bites, (2, 2), (0, 1)) - bites, 0, 1) * part
    return toward(chipped, 0.6 * at.strength * lip, 0.9 if at.bright else 0.1)


def breakage(image: Array, part: Array, site: Site, rng: Generator) -> Array:
    """A chunk broken off the rim: straight fracture lines, a facet in other light, the ground behind it."""
    size, at = part.shape[0], rim_site(part, site)
    radius = max(at.radius * 1.2, 7 * size / 256)
    x, y = grid(size)
    u, v = (
        (x + 1) * np.float32(size / 2) - np.float32(at.x),
        (y + 1) * np.float32(size / 2) - np.float32(at.y),
    )
    distance = np.full((size, size), -1e3, np.float32)
    turns = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.uniform(0.6, 1.6, 6))
    waver = np.float32(0.12 * radius) * field(spectrum(size, 14, slope=1), rng)
    for turn in turns:
        np.maximum(
            distance,
            u * np.float32(np.cos(turn)) + v * np.float32(np.sin(turn)) - rng.uniform(0.5, 1) * radius,
            out=distance,
        )
    distance += waver
    facet = part * np.clip(0.5 - distance, 0, 1)
    gone = part * np.clip(0.5 - distance - np.float32(rng.uniform(0.1, 0.6) * radius), 0, 1)
    tone = rng.uniform(1.2, 1.7) if at.bright else rng.uniform(0.4, 0.8)
    rough = 1 + 0.15 * field(spectrum(size, 5, slope=0.5), rng)
    broken = toward(image, (0.4 + 0.6 * at.strength) * facet, image * tone * rough[..., None])
    return toward(broken, gone, behind(image, part, rng))


def dent(image: Array, part: Array, site: Site, rng: Generator) -> Array:
    """A dent or bump: nothing but shading, one flank bright and the other dark."""
    shape = blob_at(part, site, rng, softness=1.4, rough=0.15, scale=0.8)
    shade = relief(shape, rng.uniform(0, 2 * np.pi))
    peak = max(float(np.abs(shade).max()), 1e-3)
    return image * (1 + np.float32(min(0.9, 0.15 + 0.9 * site.strength) / peak) * shade)[..., None]


def wear(image: Array, part: Array, site: Site, rng: Generator) -> Array:
    """The relief is polished away or bitten deeper: local contrast is scaled about the local mean."""
    alpha = blob_at(part, site, rng, softness=0.5, scale=1.2)
    box = window(part.shape[0], site.y, site.x, site.radius)
    mean = image[box].mean((0, 1))
    factor = rng.uniform(0.0, 0.4) if rng.random() < 0.5 else rng.uniform(1.6, 2.6)
    tone = 1 + (0.25 if site.bright else -0.2) * site.strength
    return toward(image, alpha, np.clip(mean * np.float32(tone) + np.float32(factor) * (image - mean), 0, 1.2))
