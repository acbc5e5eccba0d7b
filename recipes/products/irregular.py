"""Irregular textures: random fields with the spectrum of a material.

Each function draws a product's parameters and returns how to shoot it. Every shot has a new random field: two
samples of one product share statistics, never pixels. `tone` is luminance before colouring, around 0.2..0.8.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from products.fields import (
    Array,
    Draw,
    Pose,
    field,
    loguniform,
    make_palette,
    relief,
    smoothstep,
    spectrum,
)


def filled(tone: Callable[[Generator, Pose], Array], palette: Callable[[Array], Array]) -> Draw:
    """A shot of a product that fills the frame: tone -> colours, part = everywhere."""

    def draw(rng: Generator, pose: Pose) -> tuple[Array, Array]:
        image = palette(tone(rng, pose)).astype(np.float32, copy=False)
        return image, np.ones(image.shape[:2], np.float32)

    return draw


def axis(rng: Generator) -> float:
    """A grain direction: mostly along an image axis, as parts are mounted."""
    return float(rng.choice([0.0, np.pi / 2, rng.uniform(0, np.pi)], p=[0.3, 0.5, 0.2]))


def brushed(rng: Generator, size: int) -> Draw:
    """Ground or brushed metal: fine and broad streaks along one direction over a cloudy tone."""
    angle, level = axis(rng), rng.uniform(0.25, 0.7)
    fine = spectrum(size, loguniform(rng, 1.0, 2.5), slope=0.2, angle=angle, stretch=loguniform(rng, 6, 60))
    broad = spectrum(size, loguniform(rng, 6, 20), slope=0.5, angle=angle, stretch=loguniform(rng, 8, 50))
    grain = spectrum(size, loguniform(rng, 0.8, 2.0), slope=0.0)
    cloud = spectrum(size, 30, slope=1.2)
    gain = [
        loguniform(rng, 0.015, 0.07),
        loguniform(rng, 0.01, 0.06),
        loguniform(rng, 0.005, 0.04),
        rng.uniform(0, 0.06),
    ]

    def tone(rng: Generator, pose: Pose) -> Array:
        lines = gain[0] * field(fine, rng) + gain[1] * field(broad, rng)
        # Glints are brighter than grooves are dark: the streaks are skewed.
        lines = pose.warp(lines + 0.6 * np.maximum(lines, 0), wrap=True)
        return level * (1 + lines * 2) + gain[2] * field(grain, rng) + gain[3] * field(cloud, rng)

    return filled(tone, make_palette(rng, grey=0.85))


def ground(rng: Generator, size: int) -> Draw:
    """Ground ceramic, ferrite, sintered metal: granular, mottled, with grooves that glint here and there."""
    angle, level = axis(rng), rng.uniform(0.2, 0.6)
    grooves = spectrum(size, loguniform(rng, 1.2, 4), slope=0.3, angle=angle, stretch=loguniform(rng, 15, 80))
    grains = spectrum(
        size, loguniform(rng, 0.9, 2.5), slope=rng.uniform(0, 0.5), angle=angle, stretch=rng.uniform(1, 4)
    )
    patches = spectrum(size, loguniform(rng, 25, 80), slope=1, angle=angle, stretch=rng.uniform(1, 4))
    groove_gain, grain_gain, patch_gain = (
        loguniform(rng, 0.04, 0.2),
        loguniform(rng, 0.03, 0.12),
        rng.uniform(0.02, 0.15),
    )
    chatter, chatter_gain = np.float32(rng.uniform(20, 120)), rng.choice([0, rng.uniform(0.01, 0.05)])

    def tone(rng: Generator, pose: Pose) -> Array:
        patch = np.clip(field(patches, rng), -2, 2)
        lines = pose.warp(field(grooves, rng), wrap=True)
        glints = np.maximum(lines, 0) ** 2 * 0.5 - np.maximum(-lines, 0) * 0.3
        x, y = pose.coords()
        waves = np.sin((x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))) * chatter + rng.uniform(0, 6))
        lively = np.clip(1 + 0.7 * np.roll(patch, size // 2, 0), 0, 2.5)
        texture = groove_gain * glints * lively + grain_gain * field(grains, rng) + np.float32(chatter_gain) * waves
        return level * (1 + texture + patch_gain * patch)

    return filled(tone, make_palette(rng, grey=0.95))


def grain(rng: Generator, size: int) -> Draw:
    """Fine noise, anisotropic, with energy at several scales (cast, sand-blasted, ceramic, sintered)."""
    angle, level = axis(rng), rng.uniform(0.2, 0.75)
    parts = [
        (spectrum(size, wave, slope=rng.uniform(0, 1), angle=angle, stretch=loguniform(rng, 1, 5)), amount)
        for wave, amount in zip(
            (loguniform(rng, 0.8, 2), loguniform(rng, 2, 6), loguniform(rng, 8, 30)),
            (loguniform(rng, 0.01, 0.08), loguniform(rng, 0.005, 0.06), loguniform(rng, 0.003, 0.04)),
            strict=True,
        )
    ]

    def tone(rng: Generator, pose: Pose) -> Array:
        total = np.full((size, size), level, np.float32)
        for amplitude, amount in parts:
            total += amount * field(amplitude, rng)
        return pose.warp(total, wrap=True)

    return filled(tone, make_palette(rng, grey=0.7))


def wood(rng: Generator, size: int) -> Draw:
    """Wood: growth rings as the contours of a stretched field, with fibres and pores."""
    angle, rings, level = axis(rng), loguniform(rng, 1.5, 6), rng.uniform(0.35, 0.65)
    shape = spectrum(size, 60, slope=1.5, angle=angle, stretch=loguniform(rng, 4, 10))
    fibre = spectrum(size, loguniform(rng, 1, 2), angle=angle, stretch=loguniform(rng, 10, 40))
    ring_gain, fibre_gain = rng.uniform(0.04, 0.18), loguniform(rng, 0.02, 0.08)
    ramp = rng.uniform(2, 9)

    def tone(rng: Generator, pose: Pose) -> Array:
        x, y = pose.coords()
        across = y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle))
        phase = pose.warp(field(shape, rng), wrap=True) * rings + across * ramp + rng.uniform(0, 9)
        saw = phase - np.floor(phase)
        late = smoothstep(saw * 1.15) - smoothstep((saw - 0.87) * 8)
        fibres = pose.warp(field(fibre, rng), wrap=True)
        return level + ring_gain * (0.5 - late) + fibre_gain * fibres * (0.6 + 0.8 * late)

    return filled(tone, make_palette(rng, grey=0.25))


def leather(rng: Generator, size: int) -> Draw:
    """Leather, orange peel, shrivelled paint: creases at the zeros of a narrow-band field, side-lit."""
    cells = spectrum(size, loguniform(rng, 7, 26), band=rng.uniform(0.2, 0.45), stretch=loguniform(rng, 1, 1.6))
    fine = spectrum(size, loguniform(rng, 1, 3), slope=0.5)
    light, level = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.7)
    depth, crease, fine_gain = (
        loguniform(rng, 0.06, 0.3),
        loguniform(rng, 0.03, 0.2),
        loguniform(rng, 0.008, 0.05),
    )

    def tone(rng: Generator, pose: Pose) -> Array:
        height = np.minimum(np.abs(pose.warp(field(cells, rng), wrap=True)), 0.6) / 0.6
        shade = relief(height, light) * (size / 256)
        return level * (1 + depth * shade - crease * (1 - height) ** 3) + fine_gain * field(fine, rng)

    return filled(tone, make_palette(rng, grey=0.45))


def carpet(rng: Generator, size: int) -> Draw:
    """Carpet, felt, foam: coarse pile with strong local contrast."""
    pile = spectrum(size, loguniform(rng, 3, 8), band=rng.uniform(0.25, 0.6), stretch=loguniform(rng, 1, 2))
    dye = spectrum(size, loguniform(rng, 2, 20), slope=0.6)
    level, pile_gain, dye_gain = (
        rng.uniform(0.25, 0.6),
        loguniform(rng, 0.05, 0.16),
        loguniform(rng, 0.02, 0.1),
    )

    def tone(rng: Generator, pose: Pose) -> Array:
        return level + pile_gain * pose.warp(field(pile, rng), wrap=True) + dye_gain * field(dye, rng)

    return filled(tone, make_palette(rng, grey=0.4))


def concrete(rng: Generator, size: int) -> Draw:
    """Concrete, cast iron, plaster: clouds at all scales with small pores that are normal."""
    cloud = spectrum(size, loguniform(rng, 1, 3), slope=rng.uniform(0.7, 1.3))
    pores = spectrum(size, loguniform(rng, 4, 9), band=0.3)
    level, cloud_gain = rng.uniform(0.3, 0.7), loguniform(rng, 0.03, 0.1)
    threshold, pore_gain = rng.uniform(2.2, 3.4), rng.uniform(0.05, 0.3)
    sign = float(rng.choice([-1, -1, 1]))

    def tone(rng: Generator, pose: Pose) -> Array:
        pits = np.clip((pose.warp(field(pores, rng), wrap=True) - threshold) * 2.5, 0, 1)
        return level + cloud_gain * field(cloud, rng) + sign * pore_gain * pits

    return filled(tone, make_palette(rng, grey=0.75))


def marble(rng: Generator, size: int) -> Draw:
    """Marble and veined stone: thin veins at the zeros of a turbulent field."""
    course = spectrum(
        size,
        loguniform(rng, 2, 8),
        slope=rng.uniform(1.4, 2),
        angle=axis(rng),
        stretch=loguniform(rng, 1, 3),
    )
    cloud = spectrum(size, loguniform(rng, 4, 20), slope=1)
    level, vein, width = (
        rng.uniform(0.35, 0.75),
        rng.uniform(0.08, 0.3) * rng.choice([-1, -1, 1]),
        loguniform(rng, 3, 14),
    )
    cloud_gain = loguniform(rng, 0.02, 0.09)
    fine, fine_gain = spectrum(size, 1.2), loguniform(rng, 0.005, 0.025)

    def tone(rng: Generator, pose: Pose) -> Array:
        clouds = field(cloud, rng)
        veins = np.exp(-width * np.abs(pose.warp(field(course, rng), wrap=True))) * (0.7 + 0.3 * clouds)
        return level + vein * veins + cloud_gain * clouds + fine_gain * field(fine, rng)

    return filled(tone, make_palette(rng, grey=0.5))


def speckle(rng: Generator, size: int) -> Draw:
    """Granite, terrazzo, flecked plastic: grains of two kinds in a matrix."""
    first = spectrum(size, loguniform(rng, 4, 18), band=rng.uniform(0.3, 0.7))
    second = spectrum(size, loguniform(rng, 3, 9), band=rng.uniform(0.3, 0.6))
    level, cut = rng.uniform(0.35, 0.65), rng.uniform(0.3, 2.2, 2)
    gains, sharp = rng.uniform(0.05, 0.25, 2) * np.array([-1, rng.choice([-1, 1])]), rng.uniform(2, 8)
    fine, fine_gain = spectrum(size, 1.5), loguniform(rng, 0.005, 0.04)

    def tone(rng: Generator, pose: Pose) -> Array:
        a = np.clip((pose.warp(field(first, rng), wrap=True) - cut[0]) * sharp, 0, 1)
        b = np.clip((field(second, rng) - cut[1]) * sharp, 0, 1)
        return (level + gains[0] * a + gains[1] * b + fine_gain * field(fine, rng)).astype(np.float32)

    return filled(tone, make_palette(rng, grey=0.5))


def smooth(rng: Generator, size: int) -> Draw:
    """Painted or moulded surfaces: a slow gradient with a trace of orange peel."""
    direction, slope, level = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.2), rng.uniform(0.2, 0.8)
    peel = spectrum(size, loguniform(rng, 2, 10), slope=0.6)
    cloud = spectrum(size, 50, slope=1)
    gains = loguniform(rng, 0.004, 0.025), rng.uniform(0, 0.03)

    def tone(rng: Generator, pose: Pose) -> Array:
        x, y = pose.coords()
        ramp = x * np.float32(np.cos(direction) * slope) + y * np.float32(np.sin(direction) * slope)
        return level + ramp + gains[0] * field(peel, rng) + gains[1] * field(cloud, rng)

    return filled(tone, make_palette(rng, grey=0.45))


def nonwoven(rng: Generator, size: int) -> Draw:
    """Fleece, paper, filter mats: fibres in several directions, the uppermost showing."""
    turns = rng.uniform(0, np.pi) + np.arange(4) * np.pi / 4 + rng.normal(0, 0.15, 4)
    wave, stretch = loguniform(rng, 1.2, 3), loguniform(rng, 6, 20)
    layers = [spectrum(size, wave, band=0.5, angle=turn, stretch=stretch) for turn in turns]
    cloud = spectrum(size, loguniform(rng, 8, 30), slope=0.8)
    level, fibre_gain, cloud_gain = (
        rng.uniform(0.3, 0.7),
        loguniform(rng, 0.02, 0.09),
        loguniform(rng, 0.01, 0.05),
    )

    def tone(rng: Generator, pose: Pose) -> Array:
        fibres = field(layers[0], rng)
        for layer in layers[1:]:
            np.maximum(fibres, field(layer, rng), out=fibres)
        return level + fibre_gain * (pose.warp(fibres, wrap=True) - 1) + cloud_gain * field(cloud, rng)

    return filled(tone, make_palette(rng, grey=0.55))
