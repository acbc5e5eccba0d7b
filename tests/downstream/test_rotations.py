"""Turned images are those of scipy, and the tokens of a region turn with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drawn import photographs
from scipy import ndimage
from torch import Tensor

from downstream.detector import NormalFeatures
from downstream.roi import RegionOfInterest
from downstream.rotations import turned


@pytest.mark.parametrize("turn", [0, 1 / 8, 1 / 4, 0.3, 1 / 2, 5 / 8, 3 / 4, 0.99])
def test_turned_as_scipy_does(turn: float) -> None:
    """Its mode "mirror" is what OpenCV calls reflect 101, which AnomalyDINO uses."""
    images = photographs(2, 0)
    expected = ndimage.rotate(images.numpy(), 360 * turn, (3, 2), reshape=False, order=1, mode="mirror")
    np.testing.assert_allclose(turned(images, turn).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("side", [12, 13])
def test_turns_add_up(side: int) -> None:
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    assert torch.equal(turned(turned(images, 0.25), 0.75), images)
    assert torch.equal(turned(turned(images, 0.5), 0.25), turned(images, 0.75))


def test_rows_are_those_of_turned_images_in_the_turned_region() -> None:
    """The features are the pixels, so that a row is a pixel; a corner that is turned out of the picture gives none."""
    images, grid = photographs(3, 0), torch.zeros(3, 64, 64)
    corner = torch.zeros(64, 64, dtype=torch.bool)
    corner[:6, :6] = True
    regions = torch.stack([corner, ~corner, torch.ones_like(corner)])

    def embed(features: list[Tensor]) -> Tensor:
        return features[0].permute(0, 2, 3, 1)

    normals = NormalFeatures(lambda x: [x], images.split(2), RegionOfInterest(regions))
    rows = list(normals.rows(embed, 8))
    assert len(rows) == 16
    inside = RegionOfInterest(regions).inside(grid)
    torch.testing.assert_close(rows[0], torch.cat([embed([images])[i][inside[i]] for i in (0, 1)]))
    quarter = torch.cat([embed([torch.rot90(images, 1, (2, 3))])[i][torch.rot90(inside[i])] for i in (0, 1)])
    assert torch.equal(rows[2], quarter)
    assert [len(rows[number]) for number in (8, 10)] == [64 * 64] * 2
    assert torch.equal(rows[1], embed([turned(images[1:2], 1 / 8)]).flatten(0, 2))  # none of the first image's corner
    alone = NormalFeatures(lambda x: [x], [images[:1]], RegionOfInterest(corner))
    assert [len(found) for found in alone.rows(embed, 8)] == [36, 0] * 4
    with pytest.raises(ValueError, match="covers half of no cell"):
        next(NormalFeatures(lambda x: [x], [images[:1]], RegionOfInterest(corner & ~corner)).rows(embed, 8))
