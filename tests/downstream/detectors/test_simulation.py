"""Made-up defects: masks that tell the truth, and everything from the key alone.

Shapes: B images, S side in pixels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from downstream.detectors.refined.simulation import SimulationConfig, gradient_noise, random_region, shuffled, simulate

ALWAYS = SimulationConfig(normal_share=0.0)


def photographs(count: int = 6, size: int = 80) -> Tensor:
    """Normalised images with structure everywhere: waves and noise."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 12, size)
    waves = torch.stack([(k * ramp[:, None]).sin() * (ramp[None] / k).cos() for k in (1, 2, 3)])
    return waves + 0.2 * torch.randn(count, 3, size, size, generator=generator)


def keys(count: int, seed: int = 0) -> list[tuple[int, int, int]]:
    return [(seed, 0, index) for index in range(count)]


@pytest.mark.parametrize("kind", ["structural", "textural"])
def test_masks_mark_exactly_the_changed_pixels(kind: str) -> None:
    images = photographs()
    before = images.clone()
    result = simulate(images, keys(6), replace(ALWAYS, kind=kind))
    assert torch.equal(images, before)
    assert torch.equal(result.masks, (result.images != images).any(1))
    moved = (result.images - images).abs().amax(1)
    assert float(moved[result.masks].min()) >= ALWAYS.visible - 1e-6
    shares = result.masks.float().mean((1, 2))
    assert (shares > 0).all()
    assert (shares <= ALWAYS.largest_area + 1e-3).all()


def test_a_flat_image_has_no_structural_defect() -> None:
    """Shuffled patches of one colour change nothing, so nothing may be marked."""
    result = simulate(torch.full((4, 3, 64, 64), 0.3), keys(4), ALWAYS)
    assert not result.masks.any()


def test_everything_derives_from_the_key() -> None:
    images = photographs()
    together = simulate(images, keys(6), ALWAYS)
    torch.manual_seed(5)
    alone = simulate(images[4:5], keys(6)[4:5], ALWAYS)
    assert torch.equal(together.images[4], alone.images[0])
    assert torch.equal(together.masks[4], alone.masks[0])
    assert not torch.equal(simulate(images, keys(6, seed=1), ALWAYS).masks, together.masks)


def test_the_normal_share_stays_normal() -> None:
    images = photographs(1, 32).expand(400, -1, -1, -1)
    result = simulate(images, keys(400), SimulationConfig(normal_share=0.3))
    normal = ~result.masks.flatten(1).any(1)
    assert torch.equal(result.images[normal], images[normal])
    # 400 draws: a standard deviation of 2.3 %.
    assert 0.2 < float(normal.float().mean()) < 0.4


def test_regions_have_the_drawn_share_and_are_connected_blobs() -> None:
    config = SimulationConfig(smallest_area=0.05, largest_area=0.05)
    regions = [random_region(64, np.random.default_rng([1, index]), config) for index in range(20)]
    assert {int(region.sum()) for region in regions} == {round(0.05 * 64 * 64)}
    pieces = [ndimage.label(region.numpy())[1] for region in regions]
    assert max(pieces) <= 40  # as many lone pixels would be about 190 pieces
    assert min(pieces) < 10


def test_gradient_noise_is_smooth_and_zero_at_the_corners() -> None:
    field = gradient_noise(256, (4, 8), np.random.default_rng(0))
    assert field.shape == (256, 256)
    assert -1 <= float(field.min()) < -0.3
    assert 0.3 < float(field.max()) <= 1
    # Corners lie between pixels, half a pixel away from the nearest one: slopes of at most sqrt(2) cells.
    assert float(field[::64][:, ::32].abs().max()) < 2 * 0.5 * (4 + 8) / 256
    steps = torch.cat([field.diff(dim=0).flatten(), field.diff(dim=1).flatten()])
    assert float(steps.abs().max()) < 5 * 8 / 256


@pytest.mark.parametrize(("size", "grid"), [(64, 8), (80, 3), (70, 8)])
def test_shuffling_moves_whole_patches(size: int, grid: int) -> None:
    image = torch.arange(size * size, dtype=torch.float32).view(1, size, size)
    result = shuffled(image, grid, np.random.default_rng(3))
    assert result.shape == image.shape
    assert not torch.equal(result, image)
    if size % grid == 0:
        assert torch.equal(result.flatten().sort().values, image.flatten())
    # Neighbours within a patch stay neighbours: steps of 1 along rows, but at the patches' borders.
    side = -(-size // grid)
    steps = result[0].diff(dim=1)
    inside = (torch.arange(1, size) % side) != 0
    assert float((steps[:, inside] == 1).float().mean()) > 0.8


def test_textures_that_are_given_are_used() -> None:
    images = photographs(4)
    textures = torch.full((2, 3, 80, 80), 9.0)
    config = replace(ALWAYS, kind="textural", smallest_opacity=1.0)
    result = simulate(images, keys(4), config, textures)
    assert (result.images[result.masks[:, None].expand(-1, 3, -1, -1)] == 9).all()
    assert result.masks.flatten(1).any(1).all()


def test_mistakes_are_named() -> None:
    images = photographs(2)
    with pytest.raises(ValueError, match=r"3 keys for 2 images"):
        simulate(images, keys(3))
    with pytest.raises(ValueError, match=r"textures \(1, 3, 64, 64\) do not fit images \(2, 3, 80, 80\)"):
        simulate(images, keys(2), textures=torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"kind 'missing' is unknown; choose one of structural, textural"):
        SimulationConfig(kind="missing")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"areas 0.2 to 0.1"):
        SimulationConfig(smallest_area=0.2)
    with pytest.raises(ValueError, match=r"normal_share 1.5"):
        SimulationConfig(normal_share=1.5)
    with pytest.raises(ValueError, match=r"grid 1 must be at least 2"):
        SimulationConfig(grid=1)
