"""A photograph as a whole: what is measured, in which unit, and what is found that features compared place by place
cannot see."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from adpretrain.preprocess import Preprocess
from downstream.appearance import FLOORS, MEASURES, Normals, appearance

SIDE = 64
PIXELS = Preprocess(SIDE).pixels
RNG = np.random.default_rng(0)


def part(seed: int, colour: tuple[int, int, int] = (160, 60, 50)) -> Image.Image:
    """A coloured disc with a dark notch at its top, on a light ground with fine noise; lamp and place vary a little."""
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[:96, :96]
    top, left = 48 + rng.normal(0, 1, 2)
    disc = (ys - top) ** 2 + (xs - left) ** 2 < 34**2
    notch = disc & (ys < top - 12) & (abs(xs - left) < 10)
    pixels = np.where(disc[..., None], colour, (205, 200, 190)) * np.where(notch, 0.2, 1.0)[..., None]
    pixels = pixels * rng.normal(1, 0.02) + rng.normal(0, 4, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def changed(change: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Callable[[Image.Image], Image.Image]:
    return lambda photo: Image.fromarray(change(np.asarray(photo).astype(float)).clip(0, 255).astype(np.uint8))


def other_product(photo: Image.Image) -> Image.Image:
    ys, xs = np.mgrid[:96, :96]
    return Image.fromarray((120 + 60 * np.sin(xs / 3.0) * np.sin(ys / 5.0))[..., None].repeat(3, 2).astype(np.uint8))


WRONG: dict[str, tuple[Callable[[Image.Image], Image.Image], set[str]]] = {
    "a quarter of the brightness": (changed(lambda p: p / 4), {"brightness", "contrast", "layout"}),
    "100 levels brighter": (changed(lambda p: p + 100), {"brightness", "contrast", "layout"}),
    "negative": (changed(lambda p: 255 - p), {"brightness", "layout", "colour"}),
    "defocus": (lambda photo: photo.filter(ImageFilter.GaussianBlur(4)), {"sharpness"}),
    "upside down": (lambda photo: photo.rotate(180), {"layout"}),
    "white noise": (changed(lambda p: RNG.uniform(0, 255, p.shape)), {"sharpness", "colour"}),
    "another product": (other_product, set(MEASURES)),
    "another colour": (lambda photo: part(7, (50, 60, 160)), {"colour"}),
}


def rows(photos: list[Image.Image]) -> list[NDArray[np.float64]]:
    return [appearance(PIXELS(photo)) for photo in photos]


# With four normals a notch is too small to tell the top.
CASES = [(wrong, count) for wrong in WRONG for count in (4, 20) if (wrong, count) != ("upside down", 4)]


@pytest.mark.parametrize(("wrong", "count"), CASES)
def test_what_is_wrong_everywhere_is_far_from_all_normals(wrong: str, count: int) -> None:
    """At least twice as far as the farthest of 40 other good photographs, also with four normals."""
    normals = Normals(rows([part(seed) for seed in range(count)]))
    good = normals.unlike(rows([part(seed) for seed in range(100, 140)]))
    change, measures = WRONG[wrong]
    found = normals.unlike(rows([change(part(50))]))
    assert found.values[0] > 2 * good.values.max()
    assert found.measures[0] in measures


def test_distances_are_those_of_a_naive_loop() -> None:
    normal, new = rows([part(seed) for seed in range(6)]), rows([part(50, (120, 80, 50))])[0]
    expected = []
    for column, floor in enumerate(FLOORS[:5]):
        values = [row[column] for row in normal]
        centre = sorted(values)[2] / 2 + sorted(values)[3] / 2
        deviation = 1.2533 * sum(abs(value - centre) for value in values) / 6
        expected.append(abs(new[column] - centre) / (deviation**2 + floor**2 * (1 + 8 / 6)) ** 0.5)

    def apart(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float(np.sqrt(np.mean((a[5:] - b[5:]) ** 2)))

    nearest = [min(apart(a, b) for j, b in enumerate(normal) if j != i) for i, a in enumerate(normal)]
    spread = ((1.2533 * np.mean(nearest)) ** 2 + FLOORS[5] ** 2 * (1 + 8 / 6)) ** 0.5
    expected.append(min(apart(new, row) for row in normal) / spread)
    found = Normals(normal).unlike([new])
    assert found.values[0] == pytest.approx(max(expected))
    assert found.measures[0] == MEASURES[int(np.argmax(expected))]
    others = [Normals(normal[:i] + normal[i + 1 :]).unlike([normal[i]]).values[0] for i in range(6)]
    np.testing.assert_allclose(Normals(normal).leave_one_out(), others)


def test_measured_values_are_in_their_units() -> None:
    """Of a picture whose mean, deviation, colours and Laplacian are known, as the network sees it."""
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[:, ::2] = (200, 100, 50)
    row = appearance(PIXELS(Image.fromarray(pixels)))
    gray = (0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 255
    expected = [gray / 2, np.log(gray / 2 + 1 / 255), 50 / 255, 50 / 255, np.log(2 * gray + 1 / 255)]
    np.testing.assert_allclose(row[:5], expected, rtol=1e-5)
    np.testing.assert_allclose(row[5:], 0, atol=1e-6)


def test_what_nobody_sees_is_no_alarm_and_one_normal_has_no_leave_one_out() -> None:
    """Normals that are alike to the last bit: one per cent of brightness is a third of the floor at most."""
    same = Normals(rows([part(0)] * 3))
    assert same.unlike(rows([changed(lambda p: p * 1.01)(part(0))])).values[0] < 0.5
    one = Normals(rows([part(0)]))
    assert len(one.leave_one_out()) == 0
    assert one.unlike(rows([part(1)])).values[0] < one.unlike(rows([part(0).rotate(180)])).values[0]
    with pytest.raises(ValueError, match="no normal photographs"):
        Normals([])
