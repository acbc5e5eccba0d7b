"""Normal variation of the surface: what good parts show too, so that no detector may call it a defect.

Each function changes (image [S, S, C], part [S, S]) and returns both. A product draws once which of them it
has and how strongly (`habits`); each shot then draws whether and where they occur.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from products.fields import Array, field, grid, smoothstep, spectrum
from products.shapes import blob, strokes, toward

Shot = tuple[Array, Array]
Nuisance = Callable[[Array, Array, Generator], Shot]


def margins(rng: Generator, size: int) -> Nuisance:
    """The edge of the part is in view: frame margins, usually dark, with a bright or dark bevel line."""
    sides, depth = rng.random(4) < rng.uniform(0.4, 1), rng.uniform(0.0, 0.1, 4)
    ground, jitter, wave = (
        rng.choice([rng.uniform(0, 0.1), rng.uniform(0, 0.9)], p=[0.8, 0.2]),
        0.03,
        rng.uniform(0, 0.012),
    )
    line, reach, softness = rng.uniform(-0.4, 0.6), rng.uniform(0.01, 0.06), rng.uniform(20, 120)
    tone = np.float32(rng.uniform(0.7, 1))

    def apply(image: Array, part: Array, rng: Generator) -> Shot:
        x, y = grid(size)
        inside = np.full((size, size), 9, np.float32)
        for side, (present, base) in enumerate(zip(sides, depth, strict=True)):
            if not present:
                continue
            along, across = ((x, y), (y, x))[side // 2]
            away = 1 + across if side % 2 else 1 - across
            lean, phase = rng.normal(0, 0.015), rng.uniform(0, 6)
            bend = lean * along[:, :] + wave * np.sin(3 * along + phase)
            np.minimum(inside, away - np.float32(max(0, base + rng.normal(0, jitter))) + bend, out=inside)
        image = image * (1 + np.float32(line) * np.exp(-np.maximum(inside, 0) / np.float32(reach))[..., None])
        keep = smoothstep(inside * np.float32(softness) + 0.5)
        image = image * keep[..., None] + np.float32(ground) * tone * (1 - keep)[..., None]
        return image.astype(np.float32, copy=False), part * keep

    return apply


def streaks(rng: Generator, size: int) -> Nuisance:
    """Light or dark lines that run the whole length in one direction (drawing, grinding, rolling marks)."""
    vertical, count, gain = rng.random() < 0.7, rng.uniform(1, 12), rng.uniform(0.03, 0.3)
    width, dark = rng.uniform(0.5, 3), rng.uniform(0, 0.6)

    def apply(image: Array, part: Array, rng: Generator) -> Shot:
        profile = np.zeros(size, np.float32)
        axis = np.arange(size, dtype=np.float32)
        for _ in range(rng.poisson(count)):
            sign = -1 if rng.random() < dark else 1
            spread = width * rng.exponential(1) * size / 256 + 0.4
            profile += sign * gain * rng.exponential(0.5) * np.exp(-(((axis - rng.uniform(0, size)) / spread) ** 2))
        profile = np.clip(profile, -0.5, 0.6)
        fade = 1 + 0.5 * np.sin(axis * rng.uniform(0.5, 4) / size * np.pi + rng.uniform(0, 6)).astype(np.float32)
        lines = profile[None, :] * fade[:, None] if vertical else profile[:, None] * fade[None, :]
        return image * (1 + lines * part)[..., None], part

    return apply


def marks(rng: Generator, size: int) -> Nuisance:
    """Faint handling marks: hairline scratches, smudges and chalk, weaker than any defect is."""
    count, gain, smudged = rng.uniform(0.5, 3), rng.uniform(0.02, 0.07), rng.random() < 0.5

    def apply(image: Array, part: Array, rng: Generator) -> Shot:
        for _ in range(rng.poisson(count)):
            y, x = rng.uniform(0, size, 2)
            strength, target = gain * rng.uniform(0.4, 1), float(rng.random() < 0.6)
            if smudged or rng.random() < 0.3:
                alpha = blob(size, y, x, rng.uniform(0.04, 0.2) * size, rng, softness=0.8)
            else:
                alpha = strokes(size, y, x, rng.uniform(0.05, 0.4) * size, rng.uniform(0.5, 1.2) * size / 256, rng)
            image = toward(image, strength * alpha * part, target)
        return image, part

    return apply


def dust(rng: Generator, size: int) -> Nuisance:
    """Single specks of dust, smaller than the smallest defect."""
    count, target = rng.uniform(2, 15), float(rng.random() < 0.6)

    def apply(image: Array, part: Array, rng: Generator) -> Shot:
        image = image.copy()
        n = rng.poisson(count)
        y, x = rng.integers(0, size - 1, (2, n))
        strength = (rng.uniform(0.05, 0.35, n)[:, None]).astype(np.float32)
        image[y, x] += strength * (target - image[y, x])
        image[y + 1, x] += 0.5 * strength * (target - image[y + 1, x])
        return image, part

    return apply


def shadows(rng: Generator, size: int) -> Nuisance:
    """A soft shadow or reflection band of fixtures around the part, at a new place in every shot."""
    depth, width, soft = rng.uniform(-0.35, 0.25), rng.uniform(0.1, 0.6), rng.uniform(1.5, 8)

    def apply(image: Array, part: Array, rng: Generator) -> Shot:
        x, y = grid(size)
        turn, place = rng.uniform(0, np.pi), rng.uniform(-1, 1)
        across = x * np.float32(np.cos(turn)) + y * np.float32(np.sin(turn)) - np.float32(place)
        band = smoothstep((np.float32(width) - np.abs(across)) * np.float32(soft))
        return image * (1 + np.float32(depth) * band)[..., None], part

    return apply


def clouds(rng: Generator, size: int) -> Nuisance:
    """Slow blotches of tone (oil film, drying, heat): large, soft, in every shot elsewhere."""
    amplitude, gain = spectrum(size, rng.uniform(30, 90), slope=1), rng.uniform(0.03, 0.15)

    def apply(image: Array, part: Array, rng: Generator) -> Shot:
        return image * (1 + np.float32(gain) * np.clip(field(amplitude, rng), -2, 2) * part)[..., None], part

    return apply


def stamp(rng: Generator, size: int) -> Nuisance:
    """A printed or engraved serial mark: differs in every shot and is normal."""
    row, column = rng.uniform(0.15, 0.8, 2) * size
    height, gain = rng.uniform(6, 14) * size / 256, rng.uniform(0.08, 0.4)
    target = float(rng.random() < 0.5)

    def apply(image: Array, part: Array, rng: Generator) -> Shot:
        alpha = np.zeros((size, size), np.float32)
        top, left = int(row), int(column)
        cell, pen = max(2, int(height / 5)), max(1, int(height / 8))
        for i in range(4):  # seven-segment-like glyphs
            x0 = left + i * 5 * cell
            for on, (dy, dx, h, w) in zip(
                rng.random(5) < 0.65,
                ((0, 0, pen, 3), (2.5, 0, pen, 3), (5, 0, pen, 3), (0, 0, 5 * cell, 0), (0, 3, 5 * cell, 0)),
                strict=True,
            ):
                if on:
                    y, x = top + int(dy * cell), x0 + int(dx * cell)
                    alpha[y : y + h, x : x + max(pen, w * cell)] = 1
        return toward(image, np.float32(gain) * alpha * part, target), part

    return apply


NUISANCES: dict[str, tuple[Callable[[Generator, int], Nuisance], float, float]] = {
    # name: (factory, share of textured products that have it, share of object products)
    "clouds": (clouds, 0.35, 0.15),
    "streaks": (streaks, 0.3, 0.08),
    "marks": (marks, 0.4, 0.25),
    "stamp": (stamp, 0.07, 0.05),
    "dust": (dust, 0.35, 0.3),
    "shadows": (shadows, 0.2, 0.2),
    "margins": (margins, 0.4, 0.04),
}
"""In the order in which they are applied: the margins come last, they hide what is beyond the part."""


def habits(rng: Generator, size: int, textured: bool) -> list[tuple[Nuisance, float]]:
    """The nuisances of one product, each with the share of its shots that show it."""
    chosen = []
    for name, (factory, share_textures, share_objects) in NUISANCES.items():
        present = rng.random() < (share_textures if textured else share_objects)
        nuisance, rate = factory(rng, size), 1.0 if name == "margins" else rng.uniform(0.4, 1)
        if present:
            chosen.append((nuisance, rate))
    return chosen
