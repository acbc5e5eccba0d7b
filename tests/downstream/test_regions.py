"""Regions against a flood fill, masks against a naive decoder, the promise of a limit against held-out maps."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, stats

from adpretrain.preprocess import Preprocess
from downstream.calibration import calibrate
from downstream.inspection.findings import findings_files, findings_of, run_lengths, write_map, write_mask
from downstream.regions import find_regions, least_cells, paint, peak_of

Cells = frozenset[tuple[int, int]]


def field(seed: int, shape: tuple[int, int] = (24, 32), sigma: float = 1.0) -> NDArray[np.float32]:
    """Smoothed noise, in which regions of all shapes appear."""
    noise = np.random.default_rng(seed).normal(size=shape)
    return ndimage.gaussian_filter(noise, sigma).astype(np.float32)


def flood(mask: NDArray[np.bool_]) -> set[Cells]:
    """Components of a mask by walking from cell to cell."""
    left, found = {(int(y), int(x)) for y, x in np.argwhere(mask)}, set()
    while left:
        todo, region = [left.pop()], set()
        while todo:
            y, x = todo.pop()
            region.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            todo += near
        found.add(frozenset(region))
    return found


def highest(map_HW: NDArray, cells: int) -> float:
    """The definition of `peak_of`: every value, from the highest down."""
    for value in np.unique(map_HW[~np.isnan(map_HW)])[::-1]:
        if max(map(len, flood(map_HW >= value))) >= cells:
            return float(value)
    raise AssertionError("no region is so large")


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0])
def test_regions_are_those_of_a_flood_fill(sigma: float) -> None:
    map_HW = field(3, sigma=sigma)
    limit = float(np.quantile(map_HW, 0.7))
    regions = find_regions(map_HW, limit, (32, 24))  # a cell is a pixel
    found = set()
    for region in regions:
        (left, top, right, bottom), (x, y) = region.box, region.peak_at
        cells = frozenset((top + int(y), left + int(x)) for y, x in np.argwhere(region.mask))
        values = [map_HW[cell] for cell in cells]
        assert all(region.mask.any(axis)[[0, -1]].all() for axis in (0, 1))  # the box is the smallest
        assert region.mask.shape == (bottom - top, right - left)
        assert region.peak == max(values) == map_HW[y, x]
        assert region.mean == pytest.approx(np.mean(values, dtype=np.float64), rel=1e-12)
        assert region.area == len(cells)
        found.add(cells)
    assert found == flood(map_HW > limit)
    assert [region.peak for region in regions] == sorted((region.peak for region in regions), reverse=True)
    np.testing.assert_array_equal(paint(regions, (32, 24)), map_HW > limit)


def test_cells_that_touch_at_corners_are_one_region_and_equal_values_are_none() -> None:
    map_HW = np.array([[2.0, 0, 0], [0, 3, 1], [0, 0, 1]])
    (region,) = find_regions(map_HW, 1.0, (3, 3))
    assert (region.box, region.area, region.peak, region.peak_at) == ((0, 0, 2, 2), 2.0, 3.0, (1, 1))


def test_places_and_areas_are_those_of_the_photograph_and_the_product() -> None:
    """A squeezed map of 4 x 5 cells over the part (10, 20)-(210, 60) of a photograph: cells of 40 x 10 pixels."""
    map_HW = np.zeros((4, 5))
    map_HW[1, 2:4], map_HW[2, 2] = (5, 7), 6
    (region,) = find_regions(map_HW, 1, (300, 100), seen=(10, 20, 210, 60), mm_per_pixel=0.5)
    assert region.box == (90, 30, 170, 50)
    assert region.area == 3 * 400
    assert region.area_mm2 == 3 * 20 * 5  # a cell is 20 mm x 5 mm
    assert region.peak_at == (150, 35)
    assert region.mean == 6
    expected = np.zeros((100, 300), bool)
    expected[30:40, 90:170] = expected[40:50, 90:130] = True
    np.testing.assert_array_equal(paint([region], (300, 100)), expected)
    assert find_regions(map_HW, 1, (300, 100))[0].area_mm2 is None
    (small,) = find_regions(map_HW, 1, (300, 100), seen=(10, 20, 210, 60), mm_per_pixel=0.1)
    assert repr(small.area_mm2) == "12.0"  # 1200 px times 0.1 ** 2 is 12.000000000000002 in floats


@pytest.mark.parametrize("size", [(97, 61), (640, 480), (45, 200)])
@pytest.mark.parametrize("crop_from", [None, 72])
def test_a_spot_in_a_photograph_is_found_where_it_is(size: tuple[int, int], crop_from: int | None) -> None:
    """The whole way: a bright disc through the network's preprocessing, whose pixels are the map."""
    photo, preprocess = Image.new("RGB", size), Preprocess(image_size=56, crop_from=crop_from, interpolation="bilinear")
    ys, xs = np.mgrid[: size[1], : size[0]]
    radius, (cx, cy) = min(size) / 6, (size[0] * 0.55, size[1] * 0.45)
    disc = (xs + 0.5 - cx) ** 2 + (ys + 0.5 - cy) ** 2 < radius**2
    photo = Image.fromarray(disc.astype(np.uint8) * 255).convert("RGB")
    map_HW = np.asarray(preprocess.view_of(photo).convert("L"), dtype=np.float32)
    (region,) = find_regions(map_HW, 127, size, seen=preprocess.seen(size))
    cell = max(size) / 56
    np.testing.assert_allclose(region.box, (cx - radius, cy - radius, cx + radius, cy + radius), atol=cell + 1)
    assert region.area == pytest.approx(np.pi * radius**2, abs=2 * np.pi * radius * cell / 2)
    assert paint([region], size).sum() == pytest.approx(region.area, abs=2 * np.pi * radius)


def test_no_pixel_is_lost_or_painted_twice_where_cells_are_no_whole_pixels() -> None:
    map_HW = field(5, (37, 41), 0.0)
    above = find_regions(map_HW, 0.0, (300, 201))
    below = find_regions(-map_HW, 0.0, (300, 201))
    np.testing.assert_array_equal(paint(above, (300, 201)), ~paint(below, (300, 201)))
    assert sum(region.painted().sum() for region in above) == paint(above, (300, 201)).sum()


def test_a_pixel_belongs_to_the_cell_that_holds_its_centre() -> None:
    """Cells of 2.5 x 3.3 pixels, from half a pixel on; a centre on an edge belongs to the cell behind it."""
    map_HW, expected = field(6, (6, 8), 0.0), np.zeros((25, 24), bool)
    for y in range(25):
        for x in range(24):
            row, column = int((y + 0.5 - 1) // 3.3), int((x + 0.5 - 0.5) // 2.5)
            expected[y, x] = 0 <= row < 6 and 0 <= column < 8 and map_HW[row, column] > 0
    regions = find_regions(map_HW, 0.0, (24, 25), seen=(0.5, 1.0, 20.5, 20.8))
    np.testing.assert_array_equal(paint(regions, (24, 25)), expected)


def test_a_region_smaller_than_a_pixel_is_the_pixel_of_its_peak() -> None:
    map_HW = np.zeros((40, 40))
    map_HW[12, 38] = 1
    (region,) = find_regions(map_HW, 0.5, (10, 10))  # 4 x 4 cells a pixel
    assert region.area == 1 / 16
    assert region.box == (9, 3, 10, 4)
    assert np.argwhere(paint([region], (10, 10))).tolist() == [[3, 9]]


def test_nothing_is_found_outside_the_region_of_interest() -> None:
    map_HW = np.full((6, 6), 5.0)
    map_HW[:, 2:4] = np.nan
    left, right = find_regions(map_HW, 1, (6, 6))
    assert {left.box, right.box} == {(0, 0, 2, 6), (4, 0, 6, 6)}
    assert peak_of(map_HW, 12) == 5.0
    with pytest.raises(ValueError, match="a least area of 13 cells, but no connected part"):
        peak_of(map_HW, 13)
    with pytest.raises(ValueError, match="larger region of interest"):
        peak_of(np.full((3, 3), np.nan))


@pytest.mark.parametrize("sigma", [0.0, 2.0])
@pytest.mark.parametrize("cells", [1, 2, 7, 60, 400])
def test_the_peak_of_a_least_area_is_that_of_trying_every_value(sigma: float, cells: int) -> None:
    for seed in range(3):
        map_HW = np.round(field(seed, sigma=sigma), 1 if seed == 0 else 9)  # with many equal values, too
        assert peak_of(map_HW, cells) == highest(map_HW, cells)
    map_HW[:, 16] = np.nan
    if cells <= 12 * 32:
        assert peak_of(map_HW, cells) == highest(map_HW, cells)


def test_a_region_across_tiles_of_the_search_counts() -> None:
    map_HW = np.zeros((600, 600))
    map_HW[100, 100:104] = 3.0  # four cells inside a tile
    map_HW[254:258, 255:257] = 4.0  # eight, of which no tile has more than two
    map_HW[511, 511], map_HW[512, 512] = 9.0, 8.0
    assert [peak_of(map_HW, cells) for cells in (1, 2, 3, 8, 9, 600)] == [9.0, 8.0, 4.0, 4.0, 0.0, 0.0]


@pytest.mark.parametrize("cells", [1, 12])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
def test_of_exchangeable_maps_just_the_promised_share_shows_a_region(cells: int, rate: float) -> None:
    """n + 1 maps, each in turn the new one: exactly floor(rate (n + 1)) of them alarm, and that is the promise."""
    maps = [field(seed, (16, 16)) for seed in range(40)]
    peaks = [peak_of(map_HW, cells) for map_HW in maps]
    alarms = 0
    for new, map_HW in enumerate(maps):
        limit = calibrate(rate=rate, extra=peaks[:new] + peaks[new + 1 :]).threshold
        alarms += bool(find_regions(map_HW, limit, (16, 16), least_area=cells))
    assert alarms == round(rate * 40)


@pytest.mark.parametrize("cells", [1, 12])
def test_the_promise_holds_for_maps_never_seen(cells: int) -> None:
    trials, n, rate = 300, 9, 0.1
    rng, alarms = np.random.default_rng(cells), 0
    for _ in range(trials):
        gain = rng.uniform(0.5, 2.0, n + 1)  # photographs differ as a whole, too
        fields = gain[:, None, None] * ndimage.gaussian_filter(rng.normal(size=(n + 1, 16, 16)), (0, 1, 1))
        limit = calibrate(rate=rate, extra=[peak_of(map_HW, cells) for map_HW in fields[1:]]).threshold
        alarms += bool(find_regions(fields[0], limit, (16, 16), least_area=cells))
    low, high = stats.binom.ppf((0.0001, 0.9999), trials, rate)
    assert low <= alarms <= high


def test_the_limit_is_calibrated_for_the_very_regions_that_are_found() -> None:
    """Cells of 5 x 2.5 pixels: the least area is rounded alike for the limit and for the regions."""
    map_HW, size = field(8, (20, 30)), (150, 50)
    values = np.unique(map_HW)
    for area in (0, 1, 12.5, 12.6, 100, 437.5, 600):
        cells = least_cells(area, map_HW.shape, size)
        peak = peak_of(map_HW, cells)
        before = float(values[np.searchsorted(values, peak) - 1])
        assert not find_regions(map_HW, peak, size, least_area=area)
        (region,) = find_regions(map_HW, before, size, least_area=area)
        assert region.area >= area
    assert [least_cells(area, (20, 30), size) for area in (0, 12.5, 12.6, 25)] == [1, 1, 2, 2]


def decoded(counts: list[int], size: list[int]) -> NDArray[np.bool_]:
    """COCO's uncompressed run lengths, pixel by pixel: outside first, down the columns."""
    pixels, inside = [], False
    for count in counts:
        pixels += [inside] * count
        inside = not inside
    return np.array(pixels).reshape(size[::-1]).T


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.6, 0.95])
def test_run_lengths_are_the_mask(quantile: float) -> None:
    size, map_HW = (50, 31), field(2, (9, 14))
    regions = find_regions(map_HW, float(np.quantile(map_HW, quantile)) - (quantile == 0), size)
    assert regions
    for region in regions:
        counts = run_lengths(region, size)
        assert sum(counts) == 50 * 31
        assert min(counts[1:], default=1) > 0
        np.testing.assert_array_equal(decoded(list(counts), [31, 50]), paint([region], size))


def test_the_files_say_the_same_as_the_regions(tmp_path: Path) -> None:
    size, map_HW = (64, 48), field(4)
    regions = find_regions(map_HW, float(np.quantile(map_HW, 0.8)), size, mm_per_pixel=0.1)
    bare = find_regions(map_HW, float(map_HW.max()) - 1e-6, size)
    name = b"caf\xe9.png".decode("utf-8", errors="surrogateescape")
    photos = {
        "good.png": [],
        name: findings_of(name, regions, size),
        "sub/b.png": findings_of("sub/b.png", bare, size),
    }
    with findings_files(tmp_path) as add:
        for photo, found in photos.items():
            add(photo, size, found)
    findings = [finding for found in photos.values() for finding in found]

    with (tmp_path / "regions.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    assert ",".join(rows[0]) == "path,number,left,top,right,bottom,area_px,area_mm2,peak,mean,peak_x,peak_y"
    assert [(row["path"], int(row["number"])) for row in rows] == [
        *((name, number) for number in range(1, len(regions) + 1)),
        ("sub/b.png", 1),
    ]
    assert [float(row["area_px"]) for row in rows[:-1]] == [region.area for region in regions]
    assert rows[-1]["area_mm2"] == ""

    coco = json.loads((tmp_path / "regions.json").read_text("utf-8"))
    assert [image["file_name"] for image in coco["images"]] == ["good.png", "caf�.png", "sub/b.png"]
    assert len({annotation["id"] for annotation in coco["annotations"]}) == len(findings)
    for annotation, region in zip(coco["annotations"], [*regions, *bare], strict=True):
        mask, (x, y, w, h) = decoded(**annotation["segmentation"]), annotation["bbox"]
        assert mask.shape == (48, 64)
        assert mask.sum() == mask[y : y + h, x : x + w].sum() == annotation["area"]  # 2 x 2 pixels a cell
        assert (x, y, x + w, y + h) == region.box
        assert annotation["category_id"] == coco["categories"][0]["id"]
    assert [annotation["image_id"] for annotation in coco["annotations"]] == [2] * len(regions) + [3]

    write_mask(tmp_path / "masks" / "a.png", regions, size)
    saved = Image.open(tmp_path / "masks" / "a.png")
    assert (saved.mode, saved.size) == ("L", size)
    above = np.kron(map_HW > np.quantile(map_HW, 0.8), np.ones((2, 2))).astype(bool)
    np.testing.assert_array_equal(np.asarray(saved), above * 255)


def test_a_raw_map_reads_back_to_the_same_bits(tmp_path: Path) -> None:
    map_HW = field(0)
    map_HW[0, :3] = np.nan, -0.0, np.float32(1e-42)
    write_map(tmp_path / "maps" / "a.tif", map_HW)
    assert np.asarray(Image.open(tmp_path / "maps" / "a.tif")).tobytes() == map_HW.tobytes()


def test_mistakes_are_named() -> None:
    map_HW = np.zeros((4, 4))
    with pytest.raises(ValueError, match=r"shape \(1, 4, 4\) and dtype float64; expected real numbers \[H, W\]"):
        find_regions(map_HW[None], 0, (4, 4))
    with pytest.raises(ValueError, match="the map holds infinite values"):
        peak_of(np.full((2, 2), np.inf))
    with pytest.raises(ValueError, match="the limit of the regions is NaN"):
        find_regions(map_HW, float("nan"), (4, 4))
    with pytest.raises(ValueError, match="photograph of 4 x 4 pixels; expected left, top, right and bottom within"):
        find_regions(map_HW, 0, (4, 4), seen=(0, 0, 5, 4))
    with pytest.raises(ValueError, match=r"a least area of -1 pixels; expected 0"):
        find_regions(map_HW, 0, (4, 4), least_area=-1)
    with pytest.raises(ValueError, match=r"a pixel of 0 mm; expected its side on the product"):
        find_regions(map_HW, 0, (4, 4), mm_per_pixel=0)
