"""One colour scale, contours at the limit, the shown geometry, files that appear only when complete."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adpretrain.preprocess import Preprocess
from downstream.regions import find_regions
from downstream.visualise import ColourScale, numbered, outline, overlay, panel, save_png, shown_region

CONTOUR = np.array([64, 224, 255])


def gray(width: int = 80, height: int = 60) -> Image.Image:
    return Image.new("RGB", (width, height), (120, 120, 120))


def test_the_scale_runs_from_the_normal_median_over_the_limit_to_as_far_beyond() -> None:
    maps = np.array([[[0.0, 1.0], [1.0, 3.0]]])
    assert ColourScale.from_normal_maps(maps) == ColourScale(low=1.0, limit=3.0, high=5.0)
    assert ColourScale.from_normal_maps(maps, limit=1.5) == ColourScale(low=1.0, limit=1.5, high=2.0)
    # A limit below the typical value cannot be the middle of a rising scale.
    assert ColourScale.from_normal_maps(maps, limit=0.2) == ColourScale(low=1.0, limit=3.0, high=5.0)


@pytest.mark.parametrize("value", [0.0, 1e-12, 7.0])
def test_constant_normal_maps_still_give_a_rising_scale(value: float) -> None:
    scale = ColourScale.from_normal_maps(np.full((2, 4, 4), value))
    assert scale.low < scale.limit < scale.high
    assert np.isfinite(scale.shares(np.array([[value]]))).all()


@pytest.mark.parametrize("maps", [np.empty((0, 4, 4)), np.full((1, 2, 2), np.nan)])
def test_empty_or_nan_maps_are_refused(maps: np.ndarray) -> None:
    with pytest.raises(ValueError, match="no colour scale"):
        ColourScale.from_normal_maps(maps)


def test_equal_values_have_equal_colours_in_different_pictures() -> None:
    scale = ColourScale(0.0, 1.0, 2.0)
    calm, hot = np.full((8, 8), 0.5), np.full((8, 8), 0.5)
    hot[:, 4:] = 1.9  # a strong defect elsewhere must not change the calm half's colour
    first, second = (np.asarray(overlay(gray(8, 8), m, scale, contour=False)) for m in (calm, hot))
    np.testing.assert_array_equal(first[:, :3], second[:, :3])
    assert not np.array_equal(first[:, 5:], second[:, 5:])


def test_the_contour_appears_exactly_when_the_limit_is_exceeded() -> None:
    scale = ColourScale(0.0, 1.0, 2.0)
    below, above = np.full((16, 16), 0.99), np.full((16, 16), 0.5)
    above[4:12, 4:12] = 1.5
    assert not (np.asarray(overlay(gray(), below, scale)) == CONTOUR).all(axis=-1).any()
    assert (np.asarray(overlay(gray(), above, scale)) == CONTOUR).all(axis=-1).sum() > 20


def test_the_outline_is_inside_the_region_and_ignores_the_picture_edge() -> None:
    region = np.zeros((9, 9), dtype=bool)
    region[2:7, 2:7] = True
    ring = outline(region, thickness=1)
    assert ring.sum() == 16
    assert not outline(np.ones((5, 5), dtype=bool)).any()


def test_the_shown_region_keeps_the_photograph_shape_and_the_crop_of_the_network() -> None:
    photo = Image.new("RGB", (400, 200), "black")
    photo.paste("white", (100, 50, 300, 150))  # exactly the central half
    whole = shown_region(photo, Preprocess(image_size=64), longest=100)
    assert whole.size == (100, 50)
    centre = np.asarray(shown_region(photo, Preprocess(image_size=32, crop_from=64), longest=100))
    assert centre.shape == (100, 100, 3)  # of the 400 x 200 pixels the central 100 x 100
    assert centre.min() > 200  # only the white centre, up to the resampling at its border


@pytest.mark.parametrize("size", [(97, 61), (61, 97), (45, 30), (64, 64)])
def test_the_shown_region_of_a_crop_is_what_the_network_sees(size: tuple[int, int]) -> None:
    rows, columns = np.meshgrid(np.linspace(0, 255, size[1]), np.linspace(0, 255, size[0]), indexing="ij")
    photo = Image.fromarray(np.stack([rows, columns, 255 - rows], -1).astype(np.uint8))
    preprocess = Preprocess(image_size=56, crop_from=64, interpolation="bilinear")
    shown = np.asarray(shown_region(photo, preprocess, longest=56)).astype(int)
    assert abs(shown - np.asarray(preprocess.view_of(photo))).max() <= 4  # of another resampling; a pixel is up to 5


def test_extreme_shapes_stay_drawable() -> None:
    for size in ((4000, 3), (3, 4000), (1, 1)):
        shown = shown_region(Image.new("RGB", size), Preprocess(image_size=32))
        assert min(shown.size) >= 16
        panel(shown, np.zeros((32, 32)), ColourScale(0.0, 1.0, 2.0), title="x" * 500 + "\n\x00")


def test_a_panel_with_ground_truth_is_one_picture_wider() -> None:
    scale, heat = ColourScale(0.0, 1.0, 2.0), np.zeros((16, 16))
    mask = np.zeros((16, 16), dtype=bool)
    mask[4:8, 4:8] = True
    without, with_truth = panel(gray(), heat, scale), panel(gray(), heat, scale, mask=mask)
    assert with_truth.width - without.width == 80 + 8
    assert (np.asarray(with_truth) == (80, 255, 120)).all(axis=-1).any()


def test_a_map_of_another_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[S, S\]"):
        overlay(gray(), np.zeros((1, 4, 4)), ColourScale(0.0, 1.0, 2.0))


def test_an_infinite_map_is_refused() -> None:
    map_SS = np.zeros((8, 8), np.float32)
    map_SS[3, 3] = np.inf
    with pytest.raises(ValueError, match="the map holds infinite values"):
        overlay(Image.new("RGB", (8, 8)), map_SS, ColourScale(0.0, 1.0, 2.0))


def test_what_is_not_inspected_is_dark() -> None:
    map_SS = np.full((8, 8), 0.5, np.float32)
    map_SS[:, 4:] = np.nan
    drawn = np.asarray(overlay(Image.new("RGB", (32, 32), "white"), map_SS, ColourScale(0.0, 1.0, 2.0))).astype(int)
    assert drawn[:, 20:].max() < 0.65 * drawn[:, :14].min()


def test_a_failed_write_leaves_the_old_picture_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "a.png"
    save_png(gray(), target)
    before = target.read_bytes()
    with pytest.raises(OSError, match="mode"):
        save_png(Image.new("HSV", (4, 4)), target)  # PNG has no such mode
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_regions_have_boxes_and_numbers_in_the_heatmap_only() -> None:
    """The picture shows the part (100, 50)-(260, 170) of the photograph at half its size."""
    heat = np.zeros((12, 16))
    heat[4:6, 8:12] = 2  # cells of 10 x 10 pixels
    scale, seen = ColourScale(0.0, 10.0, 20.0), (100, 50, 260, 170)
    regions = find_regions(heat, 1.0, (400, 300), seen=seen)
    plain, drawn = (np.asarray(panel(gray(), heat, scale, regions=of, seen=seen)).astype(int) for of in ((), regions))
    changed = np.argwhere((plain != drawn).any(axis=-1))
    corner = np.array([22, 8 + 80 + 8])  # of the heatmap, below the header
    y, x = changed.max(axis=0) - corner
    assert (y, x) == (29, 59)  # the box is x 40 to 60, y 20 to 30 in the picture, half-open
    assert changed[:, 1].min() - corner[1] == 40
    assert (drawn[corner[0] + 29, corner[1] + 40 : corner[1] + 60] == 255).all()
    assert (changed.min(axis=0) >= corner).all()


def test_at_most_twenty_boxes_are_drawn() -> None:
    heat = np.zeros((50, 50))
    heat[1::2, ::10] = np.arange(125).reshape(25, 5) + 1
    regions = find_regions(heat, 0.0, (400, 400))
    picture = gray(400, 400)
    assert len(regions) > 20
    assert numbered(picture, regions).tobytes() == numbered(picture, regions[:20]).tobytes()
    assert numbered(picture, regions[:19]).tobytes() != numbered(picture, regions[:20]).tobytes()
