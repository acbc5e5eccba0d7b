"""Simple objects: products that stand before a background. Each function draws its art once per product."""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from products.art import blank, material, photographed
from products.fields import (
    Draw,
    box,
    circle,
    field,
    grid,
    polygon,
    random_colour,
    spectrum,
)


def ring(rng: Generator, size: int) -> Draw:
    """A washer, gasket or bearing: a flat or rounded ring, perhaps with an inner groove."""
    x, y = grid(size)
    art, outer = blank(size), rng.uniform(0.55, 0.85)
    inner = outer * rng.uniform(0.35, 0.75)
    art.add(circle(x, y, outer), material(rng), raise_by=rng.uniform(1, 5), bevel=rng.uniform(3, 20))
    if rng.random() < 0.6:
        groove = np.abs(circle(x, y, (outer + inner) / 2)) - rng.uniform(0.02, 0.06)
        art.add(groove, material(rng), raise_by=rng.uniform(-3, 3))
    art.cut(circle(x, y, inner))
    return photographed(art, rng, size)


def plate(rng: Generator, size: int) -> Draw:
    """A flat plate with drilled holes, slots and perhaps a raised field."""
    x, y = grid(size)
    width, height = rng.uniform(0.5, 0.85, 2)
    art = blank(size)
    art.add(box(x, y, width, height, rng.uniform(0.02, 0.2)), material(rng), raise_by=2, bevel=4)
    if rng.random() < 0.5:
        art.add(box(x, y, width * 0.55, height * 0.55, 0.05), material(rng), raise_by=rng.uniform(-3, 3))
    inset, radius = rng.uniform(0.1, 0.18), rng.uniform(0.04, 0.09)
    for sx in (-1, 1):
        for sy in (-1, 1):
            art.cut(circle(x - sx * (width - inset), y - sy * (height - inset), radius))
    if rng.random() < 0.6:
        art.cut(box(x, y, rng.uniform(0.05, 0.3), rng.uniform(0.03, 0.1), 0.03))
    return photographed(art, rng, size)


def gear(rng: Generator, size: int) -> Draw:
    """A toothed wheel with hub, bore and perhaps spokes."""
    x, y = grid(size)
    teeth, radius, depth = int(rng.integers(10, 36)), rng.uniform(0.55, 0.75), rng.uniform(0.04, 0.1)
    angle = np.arctan2(y, x)
    profile = np.clip(np.cos(angle * teeth) * rng.uniform(1.5, 4), -1, 1)
    art = blank(size)
    art.add(circle(x, y, radius) - np.float32(depth) * profile, material(rng), raise_by=2)
    art.add(circle(x, y, radius * 0.78), material(rng), raise_by=rng.uniform(-3, 2), bevel=5)
    if rng.random() < 0.5:
        holes = int(rng.integers(3, 7))
        for turn in np.arange(holes) * 2 * np.pi / holes:
            art.cut(circle(x - 0.5 * radius * np.cos(turn), y - 0.5 * radius * np.sin(turn), radius * 0.14))
    art.add(circle(x, y, radius * 0.28), material(rng), raise_by=2)
    art.cut(circle(x, y, radius * rng.uniform(0.1, 0.2)))
    return photographed(art, rng, size)


def bolt(rng: Generator, size: int) -> Draw:
    """A bolt head or nut: polygon, chamfer circle and a socket, slot or thread hole."""
    x, y = grid(size)
    radius, corners, turn = rng.uniform(0.5, 0.75), int(rng.choice([4, 6, 6, 8])), rng.uniform(0, 1)
    art = blank(size)
    art.add(polygon(x, y, radius, corners, turn), material(rng), raise_by=3, bevel=10)
    art.add(
        circle(x, y, radius * 0.92),
        art.albedo[size // 2, size // 2].copy(),
        raise_by=3,
        bevel=rng.uniform(4, 16),
    )
    kind, dark = rng.integers(0, 4), random_colour(rng, 0.08, 0.1)
    if kind == 0:
        art.cut(circle(x, y, radius * rng.uniform(0.35, 0.6)))
        art.add(np.abs(circle(x, y, radius * 0.65)) - 0.02, dark, raise_by=-2, on_part=True)
    elif kind == 1:
        art.add(polygon(x, y, radius * 0.4, 6, turn), dark, raise_by=-4)
    elif kind == 2:
        art.add(box(x, y, radius * 0.75, 0.06), dark, raise_by=-3)
    else:
        art.add(np.minimum(box(x, y, radius * 0.5, 0.07), box(x, y, 0.07, radius * 0.5)), dark, raise_by=-3)
    return photographed(art, rng, size)


def board(rng: Generator, size: int) -> Draw:
    """A circuit board: traces, pads, chips and passive parts on solder mask."""
    x, y = grid(size)
    art = blank(size)
    mask = random_colour(rng, rng.uniform(0.12, 0.4), 0.7)
    art.add(box(x, y, rng.uniform(0.72, 0.95), rng.uniform(0.72, 0.95), 0.03), mask, raise_by=1)
    for _ in range(rng.integers(6, 16)):
        cx, cy, length = *rng.uniform(-0.7, 0.7, 2), rng.uniform(0.1, 0.5)
        sides = (length, 0.012) if rng.random() < 0.5 else (0.012, length)
        art.add(box(x - cx, y - cy, *sides), np.clip(mask * 1.5 + 0.04, 0, 1), on_part=True)
    pad = random_colour(rng, 0.75, 0.15)
    for _ in range(rng.integers(4, 12)):
        cx, cy, w = *rng.uniform(-0.62, 0.62, 2), rng.uniform(0.03, 0.06)
        art.add(box(x - cx, y - cy, 2.2 * w, w), pad, raise_by=1)
        art.add(box(x - cx, y - cy, 1.2 * w, w * 1.05), material(rng), raise_by=1.5)
    for _ in range(rng.integers(1, 4)):
        cx, cy, w, h = *rng.uniform(-0.5, 0.5, 2), *rng.uniform(0.1, 0.26, 2)
        for leg in np.arange(-w + 0.03, w, 0.06):
            art.add(box(x - cx - leg, y - cy, 0.014, h + 0.05), pad, raise_by=0.5)
        art.add(box(x - cx, y - cy, w, h, 0.01), random_colour(rng, 0.09, 0.1), raise_by=2)
        art.add(circle(x - cx + w * 0.75, y - cy - h * 0.7, 0.02), random_colour(rng, 0.25, 0.1))
    for cx, cy in rng.uniform(-0.6, 0.6, (rng.integers(2, 7), 2)):
        art.add(circle(x - cx, y - cy, 0.035), pad)
        art.cut(circle(x - cx, y - cy, 0.016))
    return photographed(art, rng, size)


def capsule(rng: Generator, size: int) -> Draw:
    """A two-piece capsule lying flat, with a printed mark."""
    x, y = grid(size)
    length, radius = rng.uniform(0.6, 0.85), rng.uniform(0.2, 0.34)
    art = blank(size)
    body = box(x, y, length, radius, radius * 0.999)
    art.add(body, material(rng))
    cap = np.maximum(box(x, y, length, radius * 1.04, radius), x - np.float32(rng.uniform(-0.1, 0.15)))
    art.add(cap, material(rng), raise_by=1)
    across = np.clip(1 - (y / np.float32(radius)) ** 2, 0, 1)
    art.height += np.float32(size * 0.035) * np.sqrt(across) * art.part
    ink = random_colour(rng, rng.choice([0.1, 0.9]), 0.2)
    for i in range(rng.integers(2, 6)):
        shape = box(x + 0.5 - i * 0.09, y, *rng.uniform(0.012, 0.035, 2))
        art.add(shape, ink, on_part=True)
    return photographed(art, rng, size)


def pill(rng: Generator, size: int) -> Draw:
    """A tablet, round or oblong, domed, with a score line or an imprint and coloured flecks."""
    x, y = grid(size)
    a, b = rng.uniform(0.5, 0.8), rng.uniform(0.38, 0.8)
    radius = np.hypot(x / np.float32(a), y / np.float32(b))
    art = blank(size)
    colour = random_colour(rng, rng.uniform(0.5, 0.9), rng.uniform(0, 0.5))
    art.add((radius - 1) * np.float32(min(a, b)), colour)
    art.height += np.float32(size * 0.05) * np.sqrt(np.clip(1 - radius**2, 0, 1))
    if rng.random() < 0.6:
        art.add(box(x, y, a * 0.85, 0.025), colour * 0.8, raise_by=-3, on_part=True)
    if rng.random() < 0.5:
        flecks = field(spectrum(size, 9, band=0.4), rng)
        alpha = np.clip((flecks - 2) * 4, 0, 1) * art.part
        art.albedo += alpha[..., None] * (random_colour(rng, 0.4, 0.8) - art.albedo)
    return photographed(art, rng, size)


def mouth(rng: Generator, size: int) -> Draw:
    """A bottle or can from above: concentric rims with glare around a dark inside."""
    x, y = grid(size)
    art, radius = blank(size), rng.uniform(0.7, 0.92)
    art.add(circle(x, y, radius), material(rng), raise_by=4, bevel=8)
    for _ in range(rng.integers(3, 6)):
        radius *= rng.uniform(0.72, 0.93)
        art.add(circle(x, y, radius), material(rng), raise_by=rng.uniform(-5, 5), bevel=rng.uniform(3, 14))
    art.add(circle(x, y, radius * 0.8), random_colour(rng, 0.06, 0.3), raise_by=-6, bevel=12)
    return photographed(art, rng, size)


def connector(rng: Generator, size: int) -> Draw:
    """A plug housing with rows of metal pins in dark or light cavities."""
    x, y = grid(size)
    columns, rows = int(rng.integers(3, 10)), int(rng.integers(1, 4))
    width, height = rng.uniform(0.65, 0.88), rng.uniform(0.22, 0.3) * (1 + rows) * 0.6
    art, pin, cavity = (
        blank(size),
        random_colour(rng, 0.75, 0.2),
        random_colour(rng, rng.choice([0.05, 0.3]), 0.2),
    )
    art.add(box(x, y, width, height, 0.05), material(rng), raise_by=3, bevel=5)
    art.add(box(x, y, width * 0.9, height * 0.8, 0.03), material(rng), raise_by=-2)
    step = np.array([width * 1.65 / columns, height * 1.4 / rows])
    half, round_pins = step.min() * 0.36, rng.random() < 0.4
    for i in range(columns):
        for j in range(rows):
            u, v = (
                x - np.float32((i - (columns - 1) / 2) * step[0]),
                y - np.float32((j - (rows - 1) / 2) * step[1]),
            )
            art.add(box(u, v, half, half, half * 0.2), cavity, raise_by=-2)
            art.add(circle(u, v, half * 0.5) if round_pins else box(u, v, half * 0.5, half * 0.5), pin, raise_by=2)
    return photographed(art, rng, size)


def screw(rng: Generator, size: int) -> Draw:
    """A screw from the side: head, shank with thread, tip."""
    x, y = grid(size)
    radius, pitch, metal = rng.uniform(0.12, 0.22), rng.uniform(0.06, 0.12), material(rng)
    art = blank(size)
    lean = y * np.float32(0.3)
    thread = np.float32(rng.uniform(0.02, 0.05)) * np.sin((x + lean * np.sign(y)) * np.float32(2 * np.pi / pitch))
    shank = np.maximum(np.abs(y) - np.minimum(np.float32(radius), (np.float32(0.85) - x) * 1.5), np.abs(x - 0.1) - 0.75)
    art.add(shank + thread * (x > -0.2), metal)
    ridge = np.sin((x + lean) * np.float32(2 * np.pi / pitch)) * (x > -0.2) * np.float32(size * 0.008)
    art.height += art.part * (
        ridge + np.float32(size * 0.05) * np.sqrt(np.clip(1 - (y / np.float32(radius)) ** 2, 0, 1))
    )
    art.add(box(x + 0.72, y, rng.uniform(0.08, 0.15), rng.uniform(0.3, 0.42), 0.05), metal, raise_by=4, bevel=12)
    return photographed(art, rng, size)


def button(rng: Generator, size: int) -> Draw:
    """A cap or knob: dome, embossed marks in a circle, sewing or mounting holes."""
    x, y = grid(size)
    radius, count, colour = rng.uniform(0.55, 0.85), int(rng.integers(4, 14)), material(rng)
    art = blank(size)
    art.add(circle(x, y, radius), colour, raise_by=5, bevel=25)
    art.add(np.abs(circle(x, y, radius * 0.82)) - 0.02, np.clip(colour * 0.8, 0, 1), raise_by=2)
    for turn in np.arange(count) * 2 * np.pi / count:
        mark = box(x - 0.6 * radius * np.cos(turn), y - 0.6 * radius * np.sin(turn), *rng.uniform(0.015, 0.06, 2))
        art.add(mark, np.clip(colour * rng.uniform(0.6, 1.4), 0, 1), raise_by=1)
    holes = int(rng.choice([0, 2, 4]))
    for turn in np.arange(holes) * 2 * np.pi / max(holes, 1):
        art.cut(circle(x - 0.2 * radius * np.cos(turn), y - 0.2 * radius * np.sin(turn), 0.07 * radius))
    return photographed(art, rng, size)


def cable(rng: Generator, size: int) -> Draw:
    """The cut end of a cable: jacket, coloured insulation, bundles of strands."""
    x, y = grid(size)
    art, outer, cores = blank(size), rng.uniform(0.7, 0.92), int(rng.integers(2, 5))
    art.add(circle(x, y, outer), material(rng), raise_by=3, bevel=10)
    art.add(circle(x, y, outer * 0.88), random_colour(rng, 0.3, 0.2), raise_by=-2)
    orbit = outer * 0.45 if cores > 1 else 0.0
    radius = min(outer * 0.4, orbit * np.sin(np.pi / cores) * 0.98)
    copper = random_colour(rng, 0.6, 0.25)
    for turn in rng.uniform(0, 6) + np.arange(cores) * 2 * np.pi / cores:
        cx, cy = orbit * np.cos(turn), orbit * np.sin(turn)
        art.add(circle(x - cx, y - cy, radius), material(rng), raise_by=3, bevel=6)
        for ring_index, count in enumerate((1, 6, 11)):
            for strand in np.arange(count) * 2 * np.pi / count:
                reach = radius * 0.21 * ring_index
                u, v = x - cx - reach * np.cos(strand), y - cy - reach * np.sin(strand)
                art.add(circle(u, v, radius * 0.11), copper, raise_by=2, bevel=4)
    return photographed(art, rng, size)


OBJECTS: dict[str, Callable[[Generator, int], Draw]] = {
    "ring": ring,
    "plate": plate,
    "gear": gear,
    "bolt": bolt,
    "board": board,
    "capsule": capsule,
    "pill": pill,
    "mouth": mouth,
    "connector": connector,
    "screw": screw,
    "button": button,
    "cable": cable,
}
