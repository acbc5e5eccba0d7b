"""How objects are drawn and shot.

The art (albedo, height, part) is drawn once per product from signed distances on the centred grid (-1..1); a
shot lights its relief from a new direction, adds fresh micro-texture and a fresh background, and poses it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from products.fields import (
    Array,
    Draw,
    Pose,
    cover,
    field,
    loguniform,
    random_colour,
    relief,
    smoothstep,
    spectrum,
)


@dataclass
class Art:
    """A product seen from above while it is being drawn, layer by layer."""

    albedo: Array  # [S, S, 3]
    height: Array  # [S, S], px: its slope is what the light sees
    part: Array  # [S, S], 1 where the product covers the background

    def add(
        self, distance: Array, colour: Array, raise_by: float = 0.0, bevel: float = 3.0, on_part: bool = False
    ) -> None:
        """Lay a shape over the art. `raise_by` in px lifts its edge with a slope `bevel` px wide."""
        size = distance.shape[0]
        alpha = cover(distance)
        if on_part:
            alpha = alpha * self.part
        self.albedo += alpha[..., None] * (colour - self.albedo)
        self.part = np.maximum(self.part, alpha)
        if raise_by:
            k = size / 256
            self.height += raise_by * k * smoothstep(0.5 - distance * np.float32(128 / bevel))

    def cut(self, distance: Array, depth: float = 3.0) -> None:
        """Cut a shape out, so that the background shows."""
        self.part = self.part * (1 - cover(distance))
        self.height -= depth * smoothstep(0.5 - distance * np.float32(50))


def blank(size: int) -> Art:
    zeros = np.zeros((size, size), np.float32)
    return Art(np.zeros((size, size, 3), np.float32), zeros.copy(), zeros.copy())


def material(rng: Generator) -> Array:
    """A body colour: metal greys as often as anything else."""
    if rng.random() < 0.5:
        return random_colour(rng, rng.uniform(0.2, 0.8), rng.uniform(0, 0.06))
    return random_colour(rng, rng.uniform(0.15, 0.75), rng.uniform(0.1, 0.6))


def photographed(art: Art, rng: Generator, size: int) -> Draw:
    """How a product with this art is shot: its shine, micro-texture, background, grey or colour."""
    shine, aim = rng.uniform(0.2, 0.7), rng.uniform(0, 2 * np.pi)
    wander = rng.choice([0.1, 0.6])
    micro = spectrum(
        size,
        loguniform(rng, 1, 4),
        slope=rng.uniform(0, 0.8),
        angle=rng.uniform(0, np.pi),
        stretch=loguniform(rng, 1, 25),
    )
    micro_gain = loguniform(rng, 0.01, 0.08)
    behind = spectrum(
        size,
        loguniform(rng, 1, 8),
        slope=rng.uniform(0, 1.2),
        angle=rng.uniform(0, np.pi),
        stretch=loguniform(rng, 1, 15),
    )
    behind_gain = loguniform(rng, 0.003, 0.06)
    ground = random_colour(
        rng, rng.choice([rng.uniform(0.02, 0.2), rng.uniform(0.3, 0.6), rng.uniform(0.7, 0.95)]), 0.1
    )
    for _ in range(8):  # a part must stand out from its ground
        body = (art.albedo * art.part[..., None]).sum((0, 1)) / art.part.sum()
        if abs(float(body.mean() - ground.mean())) > 0.15:
            break
        ground = random_colour(rng, rng.uniform(0.02, 0.95), rng.uniform(0, 0.3))
    shadow, shadow_shift = rng.uniform(0, 0.5), rng.integers(1, max(2, size // 40))
    albedo = art.albedo.mean(-1, keepdims=True) if rng.random() < 0.45 else art.albedo
    ground = ground.mean(keepdims=True) if albedo.shape[-1] == 1 else ground
    dull = np.clip(rng.normal(1, 0.02, 16), 0.9, 1.1)  # batches differ a little in tone

    def draw(rng: Generator, pose: Pose) -> tuple[Array, Array]:
        shade = 1 + np.float32(shine) * relief(art.height, aim + rng.normal(0, wander))
        shade += np.float32(micro_gain) * field(micro, rng)
        shade *= np.float32(rng.choice(dull))
        part = pose.warp(art.part)
        dark = np.roll(part, (shadow_shift, shadow_shift), (0, 1))
        backdrop = 1 + np.float32(behind_gain) * field(behind, rng) / np.float32(max(0.2, float(ground.mean())))
        backdrop = backdrop * (1 - np.float32(shadow) * dark)
        image = np.empty_like(albedo)
        for c in range(albedo.shape[-1]):
            body = pose.warp(albedo[..., c] * shade)
            behind_c = ground[c] * backdrop
            image[..., c] = behind_c + part * (body - behind_c)
        return image, part

    return draw
