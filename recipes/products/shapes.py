"""Irregular shapes as soft coverage planes [S, S] in 0..1, for defects and marks. Positions are in px."""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from products.fields import Array, smoothstep

OVERSAMPLE = 2


def toward(image: Array, alpha: Array, target: Array | float) -> Array:
    """Blend `image` [S, S, C] towards a colour [C] or value by `alpha` [S, S]."""
    return image + alpha[..., None] * (np.asarray(target, np.float32) - image)


def window(size: int, y: float, x: float, radius: float) -> tuple[slice, slice]:
    """The part of the image within `radius` of a point, never empty for a point inside."""
    rows = slice(max(0, int(y - radius)), min(size, int(y + radius) + 2))
    return rows, slice(max(0, int(x - radius)), min(size, int(x + radius) + 2))


def blob(
    size: int,
    y: float,
    x: float,
    radius: float,
    rng: Generator,
    *,
    softness: float = 0.3,
    rough: float = 0.25,
    aspect: float = 1.8,
) -> Array:
    """An irregular ellipse; `softness` (width of its edge) and `rough` (waviness) in parts of the radius."""
    out = np.zeros((size, size), np.float32)
    box = window(size, y, x, radius * 2.2 + 3)
    v, u = np.ogrid[box]
    dy, dx = (v - y).astype(np.float32), (u - x).astype(np.float32)
    turn, ratio = rng.uniform(0, np.pi), np.sqrt(rng.uniform(1, aspect))
    a = (dx * np.float32(np.cos(turn)) + dy * np.float32(np.sin(turn))) / np.float32(ratio)
    b = (dy * np.float32(np.cos(turn)) - dx * np.float32(np.sin(turn))) * np.float32(ratio)
    distance = np.hypot(a, b) / np.float32(radius)
    angle = np.arctan2(b, a)
    for k in range(2, 7):
        distance = distance * (
            1 + np.float32(rough * rng.normal() / k) * np.cos(k * angle + np.float32(rng.uniform(0, 6.28)))
        )
    edge = max(softness, 1.2 / radius)
    out[box] = smoothstep((1 - distance) / np.float32(edge) + 0.5)
    return out


def paint_lines(size: int, lines: list[tuple[NDArray[np.float64], float]]) -> Array:
    """Polylines (points [N, 2] as (x, y) in px, width in px) drawn antialiased; widths below one px fade."""
    canvas = Image.new("L", (size * OVERSAMPLE, size * OVERSAMPLE))
    pen = ImageDraw.Draw(canvas)
    for points, width in lines:
        wide = max(1, round(width * OVERSAMPLE))
        pen.line([tuple(p) for p in (points * OVERSAMPLE).tolist()], fill=255, width=wide, joint="curve")
    return np.asarray(canvas.reduce(OVERSAMPLE), np.float32) / 255


def course(
    y: float, x: float, length: float, rng: Generator, *, bend: float, jag: float = 0.0, steps: int = 24
) -> NDArray[np.float64]:
    """A path [steps, 2] around a point: turns by `bend` radians in all, and by `jag` at random per step."""
    turns = rng.uniform(0, 2 * np.pi) + np.linspace(0, 1, steps) * bend * rng.normal() + jag * rng.normal(size=steps)
    stride = length / steps
    path = np.cumsum(np.stack([np.cos(turns), np.sin(turns)], 1) * stride, 0)
    return path - path[steps // 2] + (x, y)


def strokes(
    size: int,
    y: float,
    x: float,
    length: float,
    width: float,
    rng: Generator,
    *,
    count: int = 1,
    bend: float = 0.5,
) -> Array:
    """One or several nearly parallel lines through a point, as scratches and hairs are."""
    first = course(y, x, length, rng, bend=bend)
    lines = [(first, width)]
    for _ in range(count - 1):
        offset = rng.normal(0, length * 0.08 + 2, 2)
        start, stop = sorted(rng.integers(0, len(first), 2))
        lines.append((first[start : stop + 2] + offset, width * rng.uniform(0.5, 1)))
    return paint_lines(size, lines)


def branches(size: int, y: float, x: float, length: float, width: float, rng: Generator) -> Array:
    """A jagged, branching, tapering line, as cracks are."""
    trunk = course(y, x, length, rng, bend=0.8, jag=0.45, steps=28)
    lines = [(trunk[i : i + 8], width * (1 - abs(i - 10) / 30)) for i in range(0, 28, 7)]
    for _ in range(rng.integers(0, 4)):
        root = trunk[rng.integers(4, 24)]
        twig = course(root[1], root[0], length * rng.uniform(0.15, 0.4), rng, bend=0.8, jag=0.5, steps=12)
        lines.append((twig - twig[0] + root, width * 0.7))
    return paint_lines(size, lines)
