"""A product and its photographs: pose, nuisances, defect, light, camera, mask."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from products.defects import DEFECTS
from products.fields import Array, Draw, Pose, make_pose
from products.lighting import Develop, Rig, make_rig, set_up
from products.nuisances import Nuisance, habits
from products.objects import OBJECTS
from products.sites import choose_site
from products.textures import TEXTURES

PRODUCTS: dict[str, Callable[[Generator, int], Draw]] = TEXTURES | OBJECTS
MIN_AREA = 12
"""Smallest defect in px of a 224 px image."""
MIN_CHANGE = 0.03
"""Smallest mean change inside the mask, in parts of the full range."""
VISIBLE = 0.012
"""Change below this (three grey levels) is never masked."""
TRIES = 8
EVERYWHERE = np.s_[:, :]


@dataclass(frozen=True)
class Product:
    """One product: everything that its samples share."""

    name: str
    kind: str
    index: int
    seed: int
    size: int
    draw: Draw
    habits: list[tuple[Nuisance, float]]
    rig: Rig
    turns: float  # standard deviation of the rotation between samples, radians
    families: tuple[str, ...]  # the defect families, in the order in which its samples take them


@dataclass(frozen=True)
class Rendering:
    """A photograph [S, S, C] in 0..1 before JPEG, its defect-free twin, the mask [S, S] (None: no defect)."""

    image: Array
    twin: Array
    mask: NDArray[np.bool_] | None


def kind_of(index: int, seed: int) -> str:
    """The kind of product number `index`: three textures to two objects, every kind once in each cycle."""
    block, place = divmod(index, 5)
    if place in (2, 4):
        names, turn = list(OBJECTS), 2 * block + place // 4
    else:
        names, turn = list(TEXTURES), 3 * block + place - place // 3
    cycle, rank = divmod(turn, len(names))
    return names[np.random.default_rng([seed, cycle, len(names)]).permutation(len(names))[rank]]


def make_product(index: int, seed: int, size: int) -> Product:
    """Draw product number `index` of the set `seed`; it depends on nothing else."""
    rng = np.random.default_rng([seed, index])
    kind = kind_of(index, seed)
    textured = kind in TEXTURES
    draw = PRODUCTS[kind](rng, size)
    turns = rng.choice([0.02, 0.08], p=[0.7, 0.3]) if textured else rng.choice([0.03, 0.1, 3.0], p=[0.5, 0.3, 0.2])
    families = tuple(rng.permutation(list(DEFECTS)).tolist())
    name = f"p{index:03d}_{kind}"
    return Product(
        name,
        kind,
        index,
        seed,
        size,
        draw,
        habits(rng, size, textured),
        make_rig(rng),
        float(turns),
        families,
    )


def _pose(product: Product, view: int, rng: Generator) -> Pose:
    """View 0 is frontal; views 1..4 look from a fixed side each, mildly tilted; all jitter a little."""
    angle = rng.normal(0, product.turns)
    scale = np.exp(rng.normal(0, 0.03)) * (0.94 if view else 1.0)
    shift = tuple(rng.normal(0, 0.03, 2))
    tilt = rng.normal(0, 0.008, 2)
    if view:
        side = (view - 1) * np.pi / 2 + 0.4
        tilt = tilt + 0.2 * np.array([np.cos(side), np.sin(side)])
        angle += 0.06 * (view - 2.5)
    return make_pose(product.size, angle, scale, shift, tuple(tilt))


def difference(image: Array, twin: Array) -> Array:
    """Largest absolute difference over the channels, [S, S]."""
    planes = np.abs(image - twin)
    return reduce(np.maximum, (planes[..., c] for c in range(planes.shape[-1])))


def changed(change: Array) -> NDArray[np.bool_]:
    """The mask [S, S] of a `difference`: what is visible, with tiny gaps closed and small holes filled."""
    mask = change > max(VISIBLE, 0.1 * float(change.max()))
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return mask
    box = (slice(max(0, rows[0] - 3), rows[-1] + 4), slice(max(0, columns[0] - 3), columns[-1] + 4))
    inner = np.pad(mask[box], 3)
    closed = ndimage.binary_closing(inner, iterations=2)
    # Only small holes are part of the defect: a ring-shaped stain keeps its clean middle.
    holes, count = ndimage.label(~closed)
    areas = np.bincount(holes.ravel(), minlength=count + 1)
    small = areas < 0.1 * inner.sum()
    small[0] = True
    closed = small[holes]
    pieces, count = ndimage.label(closed, np.ones((3, 3)))
    keep = np.bincount(pieces.ravel(), minlength=count + 1) >= 4
    keep[0] = False
    mask[box] = keep[pieces][3:-3, 3:-3]
    return mask


def _retake(damaged: Array, surface: Array, twin: Array, develop: Develop) -> Array:
    """The photograph of a damaged surface; what lies beyond the damage comes from the twin, to save time."""
    touched = difference(damaged, surface) > 0
    rows, columns = np.flatnonzero(touched.any(1)), np.flatnonzero(touched.any(0))
    image = twin.copy()
    if len(rows):
        # The camera's blur reaches one px: one px more goes in than is kept, so that the seam is exact.
        inner = np.s_[max(0, rows[0] - 1) : rows[-1] + 2, max(0, columns[0] - 1) : columns[-1] + 2]
        outer = np.s_[max(0, rows[0] - 2) : rows[-1] + 3, max(0, columns[0] - 2) : columns[-1] + 3]
        top, left = inner[0].start - outer[0].start, inner[1].start - outer[1].start
        height, width = image[inner].shape[:2]
        image[inner] = develop(damaged, outer)[top : top + height, left : left + width]
    return image


def render(product: Product, sample: int, view: int = 0, family: str | None = None) -> Rendering:
    """One photograph of sample number `sample` from view 0..4, with a defect of `family` if one can be seen.

    The defect is redrawn up to eight times, each time stronger, until it covers MIN_AREA px (at 224) and
    changes them by MIN_CHANGE on average; if none does, the photograph is normal and `mask` is None.
    Raises ValueError for an unknown family.
    """
    if family is not None and family not in DEFECTS:
        raise ValueError(f"unknown defect family {family!r}; choose one of {', '.join(DEFECTS)}")
    seeds: list[Any] = [product.seed, product.index, sample, view]
    rng = np.random.default_rng(seeds)
    surface, part = product.draw(rng, _pose(product, view, rng))
    for nuisance, rate in product.habits:
        if rng.random() < rate:
            surface, part = nuisance(surface, part, rng)
    develop = set_up(product.rig, surface, view, rng)
    twin = develop(surface, EVERYWHERE)
    if family is None:
        return Rendering(twin, twin, None)
    rng = np.random.default_rng([*seeds, list(DEFECTS).index(family)])
    for attempt in range(TRIES):
        site = choose_site(part, rng, boost=1.2**attempt)
        image = _retake(DEFECTS[family](surface, part, site, rng), surface, twin, develop)
        change = difference(image, twin)
        mask = changed(change)
        if mask.sum() >= MIN_AREA * (product.size / 224) ** 2 and change[mask].mean() >= MIN_CHANGE:
            return Rendering(image, twin, mask)
    return Rendering(twin, twin, None)
