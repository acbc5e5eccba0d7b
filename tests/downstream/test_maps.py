"""The step from patch scores to pixel maps against scipy."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from downstream.maps import gaussian_blur, pixel_maps


@pytest.mark.parametrize(("side", "sigma"), [(40, 4.0), (12, 4.0), (33, 1.3)])
def test_smoothing_is_scipys(side: int, sigma: float) -> None:
    """Also where the kernel is wider than the map."""
    maps = torch.rand(3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = np.stack([ndimage.gaussian_filter(one, sigma) for one in maps.numpy()])
    np.testing.assert_allclose(gaussian_blur(maps, sigma).numpy(), expected, rtol=1e-12)


def test_upsampling_keeps_the_grids_place() -> None:
    """Pixel centres: a 4 x 4 grid of its own row numbers becomes a ramp whose middle is exact."""
    grid = torch.arange(4.0)[None, :, None].expand(1, 4, 4)
    ramp = pixel_maps(grid, 16, sigma=0)[0, :, 0]
    torch.testing.assert_close(ramp[2:14], (torch.arange(2, 14) + 0.5) / 4 - 0.5)
    assert pixel_maps(grid, 16, sigma=2).shape == (1, 16, 16)
