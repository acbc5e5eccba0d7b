"""Regular textures: weaves, grids, prints and stripes, computed on the posed coordinates of every shot."""

import numpy as np
from numpy.random import Generator

from products.fields import (
    Array,
    Draw,
    Pose,
    field,
    loguniform,
    make_palette,
    smoothstep,
    spectrum,
)
from products.irregular import axis, filled


def fabric(rng: Generator, size: int) -> Draw:
    """A weave: warp and weft threads over and under, each thread with its own tone and a wavering course."""
    period, angle, level = loguniform(rng, 5, 16), rng.normal(0, 0.1), rng.uniform(0.3, 0.65)
    twill = int(rng.choice([0, 1, 2]))
    waver = spectrum(size, 40, slope=1)
    fuzz = spectrum(size, loguniform(rng, 0.8, 1.6))
    depth, fuzz_gain, thread_gain = rng.uniform(0.08, 0.3), rng.uniform(0.01, 0.07), rng.uniform(0, 0.06)
    weft_shift = rng.uniform(-0.12, 0.12)
    tones = rng.normal(0, thread_gain, (2, 97)).astype(np.float32)
    k = np.float32(256 / 2 / period)

    def tone(rng: Generator, pose: Pose) -> Array:
        x, y = pose.coords()
        bend = np.float32(0.25 / k) * field(waver, rng)
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        u = (x * c - y * s + bend) * k + rng.uniform(0, 50)
        v = (x * s + y * c - bend) * k + rng.uniform(0, 50)
        column, row = np.floor(u).astype(np.int32), np.floor(v).astype(np.int32)
        over = ((column + row) % 2 if twill == 0 else (column + twill * row) % 4 < 2).astype(np.float32)
        bump_u, bump_v = np.sin((u - column) * np.pi), np.sin((v - row) * np.pi)
        warp_thread = bump_u * (0.55 + 0.45 * bump_v) + tones[0][column % 97] / depth
        weft_thread = bump_v * (0.55 + 0.45 * bump_u) + (tones[1][row % 97] + weft_shift) / depth
        woven = over * warp_thread + (1 - over) * weft_thread
        return level + depth * (woven - 0.6) + fuzz_gain * field(fuzz, rng)

    return filled(tone, make_palette(rng, grey=0.45))


def tiles(rng: Generator, size: int) -> Draw:
    """Tiles or bricks with grout; each tile has its own tone."""
    nx, ny = rng.uniform(1.2, 5), rng.uniform(1.2, 5)
    joint, grout = rng.uniform(0.015, 0.06), rng.uniform(-0.35, 0.3)
    bond = float(rng.choice([0, 0.5]))
    speck = spectrum(size, loguniform(rng, 0.9, 4), slope=rng.uniform(0, 1))
    level, spread, speck_gain = rng.uniform(0.35, 0.65), rng.uniform(0, 0.06), loguniform(rng, 0.01, 0.06)

    def tone(rng: Generator, pose: Pose) -> Array:
        x, y = pose.coords()
        v = (y * 0.5 + rng.uniform(0, 1)) * np.float32(ny) + 8
        row = np.floor(v).astype(np.int32)
        u = (x * 0.5 + rng.uniform(0, 1)) * np.float32(nx) + 8 + bond * (row % 2)
        column = np.floor(u).astype(np.int32)
        edge_u = (0.5 - np.abs(u - column - 0.5)) / np.float32(nx)
        edge_v = (0.5 - np.abs(v - row - 0.5)) / np.float32(ny)
        inside = smoothstep((np.minimum(edge_u, edge_v) - np.float32(joint / 2)) * 60)
        table = rng.normal(0, spread, (32, 32)).astype(np.float32)
        surface = level + table[row % 32, column % 32] + speck_gain * field(speck, rng)
        return (surface * inside + (level + grout) * (1 - inside)).astype(np.float32)

    return filled(tone, make_palette(rng, grey=0.5))


def perforated(rng: Generator, size: int) -> Draw:
    """A plate with a regular pattern of round or square holes, straight or staggered."""
    pitch, hexagonal, square = loguniform(rng, 14, 56), rng.random() < 0.5, rng.random() < 0.3
    radius, angle = rng.uniform(0.2, 0.38), rng.normal(0, 0.15)
    level, drop = rng.uniform(0.35, 0.75), rng.uniform(0.2, 0.6) * rng.choice([1, 1, -0.5])
    metal = spectrum(size, loguniform(rng, 1, 3), slope=0.3, angle=axis(rng), stretch=loguniform(rng, 1, 20))
    metal_gain, rim, light = loguniform(rng, 0.008, 0.05), rng.uniform(0, 0.3), rng.uniform(0, 2 * np.pi)
    k = np.float32(128 / pitch)

    def tone(rng: Generator, pose: Pose) -> Array:
        x, y = pose.coords()
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        u, v = (x * c - y * s) * k + rng.uniform(0, 9), (x * s + y * c) * k + rng.uniform(0, 9)
        row = np.floor(v)
        u = u + 0.5 * (row % 2) if hexagonal else u
        du, dv = u - np.floor(u) - 0.5, v - row - 0.5
        distance = np.maximum(np.abs(du), np.abs(dv)) if square else np.hypot(du, dv)
        hole = np.clip(0.5 - (distance - radius) * np.float32(pitch * size / 256), 0, 1)
        bevel = np.exp(-(((distance - radius) * np.float32(pitch / 1.6)) ** 2)) * (
            du * np.cos(light) + dv * np.sin(light)
        )
        face = level + metal_gain * field(metal, rng)
        return (face * (1 - hole) + (level - drop) * hole + rim * bevel).astype(np.float32)

    return filled(tone, make_palette(rng, grey=0.65))


def printed(rng: Generator, size: int) -> Draw:
    """A printed or embossed pattern: one random motif repeated on a grid over a plain substrate."""
    pitch, angle = loguniform(rng, 22, 90), rng.normal(0, 0.2)
    motif = field(spectrum(64, rng.uniform(60, 140), band=0.35), rng)  # periodic: a tile without seams
    level, ink, sharp = (
        rng.uniform(0.3, 0.7),
        rng.uniform(0.06, 0.35) * rng.choice([-1, 1]),
        rng.uniform(1, 6),
    )
    fine = spectrum(size, loguniform(rng, 0.9, 3), slope=0.3)
    fine_gain = loguniform(rng, 0.006, 0.04)
    k = np.float32(128 / pitch * 64)

    def tone(rng: Generator, pose: Pose) -> Array:
        x, y = pose.coords()
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        u, v = (x * c - y * s) * k + rng.uniform(0, 64), (x * s + y * c) * k + rng.uniform(0, 64)
        column, row = np.floor(u), np.floor(v)
        fu, fv = u - column, v - row
        i, j = row.astype(np.int32) % 64, column.astype(np.int32) % 64
        top = motif[i, j] * (1 - fu) + motif[i, (j + 1) % 64] * fu
        low = motif[(i + 1) % 64, j] * (1 - fu) + motif[(i + 1) % 64, (j + 1) % 64] * fu
        value = top * (1 - fv) + low * fv
        return level + ink * np.clip(value * sharp, -0.5, 0.5) + fine_gain * field(fine, rng)

    return filled(tone, make_palette(rng, grey=0.4))


def stripes(rng: Generator, size: int) -> Draw:
    """Stripes or corrugation: a random periodic profile along one direction."""
    period, angle, level = loguniform(rng, 5, 60), axis(rng) + rng.normal(0, 0.05), rng.uniform(0.35, 0.65)
    weights = rng.normal(0, 1, 4) / np.arange(1, 5)
    weights *= loguniform(rng, 0.05, 0.22) / np.abs(weights).sum()
    phases = rng.uniform(0, 2 * np.pi, 4)
    profile = sum(
        w * np.cos(2 * np.pi * n * np.arange(256) / 256 + p)
        for n, (w, p) in enumerate(zip(weights, phases, strict=True), 1)
    ).astype(np.float32)
    fine = spectrum(size, loguniform(rng, 0.9, 3), slope=0.4, angle=angle + np.pi / 2, stretch=loguniform(rng, 1, 12))
    fine_gain = loguniform(rng, 0.008, 0.05)
    k = 128 / period * 256

    def tone(rng: Generator, pose: Pose) -> Array:
        x, y = pose.coords()
        phase = (x * np.float32(np.cos(angle) * k) + y * np.float32(np.sin(angle) * k)) + rng.uniform(0, 256)
        return level + profile[phase.astype(np.int32) & 255] + fine_gain * pose.warp(field(fine, rng), wrap=True)

    return filled(tone, make_palette(rng, grey=0.6))


def mesh(rng: Generator, size: int) -> Draw:
    """A wire grid over a dark or light ground."""
    pitch, angle, wire = (
        loguniform(rng, 12, 48),
        rng.choice([0, np.pi / 4]) + rng.normal(0, 0.05),
        rng.uniform(0.1, 0.3),
    )
    ground, contrast = rng.uniform(0.15, 0.7), rng.uniform(0.15, 0.5) * rng.choice([-1, 1])
    waver, fine = spectrum(size, 40, slope=1), spectrum(size, loguniform(rng, 1, 3), slope=0.3)
    waver_gain, fine_gain = rng.uniform(0, 0.1), loguniform(rng, 0.008, 0.04)
    k = np.float32(128 / pitch)

    def tone(rng: Generator, pose: Pose) -> Array:
        x, y = pose.coords()
        bend = waver_gain * field(waver, rng)
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        u, v = (x * c - y * s) * k + bend + rng.uniform(0, 9), (x * s + y * c) * k - bend + rng.uniform(0, 9)
        distance = np.minimum(np.abs(u - np.floor(u) - 0.5), np.abs(v - np.floor(v) - 0.5)) / np.float32(wire)
        profile = np.sqrt(np.clip(1 - distance, 0, 1))  # round wires catch light in the middle
        return (ground + contrast * profile + fine_gain * field(fine, rng)).astype(np.float32)

    return filled(tone, make_palette(rng, grey=0.6))
