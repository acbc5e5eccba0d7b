"""Tiles: geometry against a naive loop, stitching of a known map, and detectors on them against the same by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adpretrain import ADExtractor, load_backbone
from downstream import FeatureNorm
from downstream.detectors import build_detector, detector_from_pretrained
from downstream.detectors.tiled import Stitched, Tiled, TiledConfig
from downstream.tiles import Tiling

SIDE = 64


@pytest.fixture(scope="module")
def extractor() -> ADExtractor:
    return ADExtractor(load_backbone("lite0", image_size=SIDE, finest=8))


def photographs(count: int, width: int = 200, height: int = 136, seed: int = 0) -> torch.Tensor:
    draw = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    texture = 120 + 50 * np.sin(x / 9) * np.cos(y / 7)
    return torch.from_numpy(
        np.stack([np.clip(texture[None] + draw.normal(0, 6, (3, height, width)), 0, 255) for _ in range(count)])
    ).to(torch.uint8)


@settings(max_examples=60, deadline=None)
@given(width=st.integers(16, 400), height=st.integers(16, 400), tile=st.integers(16, 160), overlap=st.floats(0, 0.5))
def test_the_tiles_cover_every_pixel_and_overlap_as_asked(width: int, height: int, tile: int, overlap: float) -> None:
    tiling = Tiling(tile, overlap)
    if min(width, height) < tile:
        with pytest.raises(ValueError, match="smaller than a tile"):
            tiling.rows(width, height)
        return
    covered = np.zeros((height, width), int)
    for row in tiling.rows(width, height):
        for left, top, right, bottom in row:
            assert (right - left, bottom - top) == (tile, tile)
            assert left >= 0
            assert right <= width
            assert top >= 0
            assert bottom <= height
            covered[top:bottom, left:right] += 1
    assert covered.min() >= 1
    starts = tiling.starts(width)
    assert starts[0] == 0
    assert starts[-1] == width - tile
    assert all(second - first <= tile * (1 - overlap) + 1 for first, second in itertools.pairwise(starts))


@pytest.mark.parametrize(("tile", "side"), [(40, 40), (40, 64), (64, 32)])
def test_stitching_the_tiles_of_a_map_gives_the_map_back(tile: int, side: int) -> None:
    tiling = Tiling(tile, 0.25)
    width, height = 200, 136

    # A smooth field is sampled at the cells of every tile, as a detector that sees it would.
    def field(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.sin(x / 60)[None] + torch.cos(y / 50)[:, None]

    stitched = Stitched(tiling, width, height, torch.zeros(1, side, side))
    at = (torch.arange(side) + 0.5) * tile / side
    for row in tiling.rows(width, height):
        for box in row:
            stitched.add(box, field(box[0] + at, box[1] + at)[None])
    found = stitched.maps()[0]
    rows, columns = found.shape
    assert (rows, columns) == (round(height * side / tile), round(width * side / tile))
    expected = field((torch.arange(columns) + 0.5) * width / columns, (torch.arange(rows) + 0.5) * height / rows)
    # A tile is placed to within half a cell; the field changes by at most 1/50 per pixel.
    assert float((found - expected).abs().max()) <= 2 * 0.5 * tile / side / 50 + 1e-3


def test_a_tile_of_the_whole_photograph_is_the_detector_itself(extractor: ADExtractor) -> None:
    square = photographs(5, SIDE, SIDE)
    prepared = torch.stack([extractor.preprocess(Image.fromarray(one.permute(1, 2, 0).numpy())) for one in square])
    plain = FeatureNorm(extractor).fit([prepared[:4]])
    tiled = Tiled(extractor, TiledConfig(Tiling(SIDE))).fit([square[:4]])
    expected, found = plain.predict(prepared[4:]), tiled.predict(square[4:])
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.maps, expected.maps, rtol=1e-4, atol=1e-5)
    alone, by_hand = tiled.leave_one_out(), plain.leave_one_out(prepared[:4])
    torch.testing.assert_close(alone.scores, by_hand.scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone.maps, by_hand.maps, rtol=1e-4, atol=1e-5)


def test_every_place_is_compared_with_the_same_place(extractor: ADExtractor) -> None:
    images, tiling = photographs(4), Tiling(SIDE, 0.25)
    tiled = Tiled(extractor, TiledConfig(tiling)).fit([images[:3]])
    boxes = [box for row in tiling.rows(200, 136) for box in row]
    assert len(tiled.places) == len(boxes)
    left, top, right, bottom = boxes[3]
    tiles = torch.stack(
        [
            extractor.preprocess(Image.fromarray(one[:, top:bottom, left:right].permute(1, 2, 0).numpy()))
            for one in images
        ]
    )
    expected = FeatureNorm(extractor).fit([tiles[:3]]).predict(tiles[3:])
    torch.testing.assert_close(tiled.places[3].predict(tiles[3:]).scores, expected.scores, rtol=1e-5, atol=1e-6)
    scores = tiled.predict(images[3:]).scores
    assert float(scores) >= float(expected.scores) - 1e-5


@pytest.mark.parametrize("detector", ["featurenorm", "patchcore", "padim", "spade", "subspacead", "anomalydino"])
@pytest.mark.parametrize("positions", ["local", "global"])
def test_any_detector_finds_a_small_mark_and_is_saved_to_the_bit(
    extractor: ADExtractor, tmp_path: object, detector: str, positions: str
) -> None:
    images = photographs(7)
    marked = images[6:].clone()
    marked[:, :, 60:70, 150:160] = 250
    options = {"embedding": {"levels": [-2, -1]}} if detector != "featurenorm" else {}
    network = extractor if detector == "featurenorm" else extractor.backbone
    config = {"tiling": {"tile": SIDE, "positions": positions}, "detector": detector, "options": options}
    tiled = build_detector("tiled", network, config).fit(images[:5].split(2))
    good, bad = tiled.predict(images[5:6]), tiled.predict(marked)
    assert float(bad.scores) > 1.2 * float(good.scores)
    peak = int(bad.maps[0].argmax())
    row, column = divmod(peak, bad.maps.shape[2])
    assert abs(row - 65) < 12
    assert abs(column - 155) < 12
    folder = tiled.save_pretrained(f"{tmp_path}/saved")
    loaded = detector_from_pretrained(folder)
    again = loaded.predict(marked)
    assert torch.equal(again.scores, bad.scores)
    assert torch.equal(again.maps, bad.maps)


def test_global_leave_one_out_leaves_a_whole_photograph_out(extractor: ADExtractor) -> None:
    images = photographs(3)
    config = TiledConfig(Tiling(SIDE, 0.25, "global"))
    found = Tiled(extractor, config).fit([images]).leave_one_out()
    for number in range(3):
        others = torch.cat([images[:number], images[number + 1 :]])
        expected = Tiled(extractor, config).fit([others]).predict(images[number : number + 1])
        torch.testing.assert_close(found.scores[number : number + 1], expected.scores, rtol=1e-4, atol=1e-5)


def test_wrong_photographs_are_refused(extractor: ADExtractor) -> None:
    tiled = Tiled(extractor, TiledConfig(Tiling(SIDE))).fit([photographs(2)])
    with pytest.raises(ValueError, match="same size"):
        tiled.predict(photographs(1, 190, 136))
    with pytest.raises(ValueError, match="uint8"):
        tiled.predict(torch.rand(1, 3, 136, 200))
    with pytest.raises(ValueError, match="lower --tile to at most 40"):
        Tiled(extractor, TiledConfig(Tiling(SIDE))).fit([photographs(2, 40, 50)])
    with pytest.raises(ValueError, match="expected a share"):
        Tiling(64, 0.7)


@pytest.mark.parametrize("positions", ["local", "global"])
def test_nothing_outside_the_region_of_interest_is_scored(
    extractor: ADExtractor, tmp_path: object, positions: str
) -> None:
    images = photographs(5)
    roi = torch.zeros(136, 200, dtype=torch.bool)
    roi[:, :90] = True
    config = TiledConfig(Tiling(SIDE, 0.25, positions))  # type: ignore[arg-type]
    tiled = Tiled(extractor, config).fit([images[:3]], roi=roi)
    outside, inside = images[4:].clone(), images[4:].clone()
    outside[:, :, 60:70, 180:190] = 250
    inside[:, :, 60:70, 30:40] = 250
    good = tiled.predict(images[4:])
    assert torch.equal(tiled.predict(outside).scores, good.scores)
    assert float(tiled.predict(inside).scores) > 1.2 * float(good.scores)
    assert bool(good.maps[0, :, 110:].isnan().all())
    assert not bool(good.maps[0, :, :80].isnan().any())
    alone = tiled.leave_one_out()
    for number in range(3):
        others = torch.cat([images[:number], images[number + 1 : 3]])
        expected = Tiled(extractor, config).fit([others], roi=roi).predict(images[number : number + 1])
        torch.testing.assert_close(alone.scores[number : number + 1], expected.scores, rtol=1e-4, atol=1e-5)
    loaded = detector_from_pretrained(tiled.save_pretrained(f"{tmp_path}/saved"))
    assert torch.equal(loaded.predict(inside).scores, tiled.predict(inside).scores)
    with pytest.raises(ValueError, match="one bool tensor"):
        Tiled(extractor, config).fit([images[:3]], roi=roi[None])
