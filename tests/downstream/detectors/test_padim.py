"""PaDiM equals a loop over positions with numpy's covariance, scipy's Mahalanobis distance and scipy's smoothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import SIZE, photographs
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from adpretrain.backbones import Backbone, FeatureMaps
from downstream.detectors.padim import ADPRETRAIN, PaDiM, PaDiMConfig
from downstream.embedding import Embedding, EmbeddingConfig


def naive_grid(normal_nHWD: Tensor, query_HWD: Tensor, eps: float) -> NDArray[np.float64]:
    """Mahalanobis distances position by position: [H, W]."""
    height, width, channels = query_HWD.shape
    out = np.empty((height, width))
    for h in range(height):
        for w in range(width):
            normal = normal_nHWD[:, h, w].double().numpy()
            inverse = np.linalg.inv(np.cov(normal, rowvar=False) + eps * np.eye(channels))
            delta = query_HWD[h, w].double().numpy() - normal.mean(0)
            out[h, w] = np.sqrt(delta @ inverse @ delta)
    return out


def naive_map(normal_nHWD: Tensor, query_HWD: Tensor, eps: float) -> NDArray[np.float64]:
    """The distances, upsampled to the image: [S, S]."""
    grid = torch.from_numpy(naive_grid(normal_nHWD, query_HWD, eps))[None, None]
    return F.interpolate(grid, (SIZE, SIZE), mode="bilinear", align_corners=False)[0, 0].numpy()


def corner_to_corner(grid_HW: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bilinear upsampling whose corners are the grid's corners, one axis after the other: [S, S]."""
    rows, columns = (np.linspace(0, side - 1, SIZE) for side in grid_HW.shape)
    wide = np.array([np.interp(columns, np.arange(grid_HW.shape[1]), row) for row in grid_HW])
    return np.array([np.interp(rows, np.arange(grid_HW.shape[0]), column) for column in wide.T]).T


@pytest.mark.parametrize("images", [6, 40])
@pytest.mark.parametrize("reduction", ["choose", "orthogonal"])
def test_equals_the_loop(backbone: Backbone, images: int, reduction: str) -> None:
    config = PaDiMConfig(EmbeddingConfig(patch=1, target_dim=20, reduction=reduction))  # type: ignore[arg-type]
    normal, queries = photographs(images, 0), photographs(3, 1)
    found = PaDiM(backbone, config).fit(normal.split(4)).predict(queries)
    embedding = Embedding(config.embedding)
    normal_nHWD, query_BHWD = embedding(backbone(normal)), embedding(backbone(queries))
    for index in range(3):
        expected = ndimage.gaussian_filter(naive_map(normal_nHWD, query_BHWD[index], 0.01), 4)
        np.testing.assert_allclose(found.maps[index].numpy(), expected, rtol=1e-3)
        assert float(found.scores[index]) == pytest.approx(expected.max(), rel=1e-3)


def test_the_evaluation_of_adpretrain(backbone: Backbone) -> None:
    """Every level on its own with all its channels, covariance + 0.01 I, corners aligned, mean of the maps, sigma 4."""

    def pyramid(images: Tensor) -> FeatureMaps:
        return [F.avg_pool2d(level, 2**number) for number, level in enumerate(backbone(images)[:3])]

    normal, query = photographs(5, 0), photographs(1, 1)
    found = PaDiM(pyramid, ADPRETRAIN).fit([normal]).predict(query)
    maps = [
        corner_to_corner(naive_grid(n.permute(0, 2, 3, 1), q[0].permute(1, 2, 0), 0.01))
        for n, q in zip(pyramid(normal), pyramid(query), strict=True)
    ]
    expected = ndimage.gaussian_filter(np.mean(maps, 0), 4)
    np.testing.assert_allclose(found.maps[0].numpy(), expected, rtol=1e-3)


def test_a_mark_is_found_where_it_is(backbone: Backbone) -> None:
    normal = photographs(12, 0) * 0.05 + 0.5
    marked = normal[:1].clone()
    marked[:, :, 40:52, 8:20] = 0
    detector = PaDiM(backbone).fit(normal.split(5))
    good, bad = detector.predict(photographs(4, 2) * 0.05 + 0.5), detector.predict(marked)
    assert bad.scores[0] > 2 * good.scores.max()
    y, x = divmod(int(bad.maps[0].argmax()), SIZE)
    assert 36 <= y < 56
    assert 4 <= x < 24


def test_batches_do_not_change_a_prediction(backbone: Backbone) -> None:
    detector = PaDiM(backbone).fit([photographs(6, 0)])
    queries = photographs(4, 1)
    whole = detector.predict(queries)
    for index, query in enumerate(queries):
        torch.testing.assert_close(detector.predict(query[None]).maps[0], whole.maps[index], rtol=1e-4, atol=1e-5)


def test_mistakes_are_named(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="eps 0 must be positive"):
        PaDiMConfig(eps=0)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        PaDiM(backbone).fit([photographs(1, 0)])
    with pytest.raises(ValueError, match="target_dim 200 exceeds the 152 channels"):
        PaDiM(backbone, PaDiMConfig(EmbeddingConfig(target_dim=200, reduction="choose"))).fit([photographs(2, 0)])
    # 64 positions x 100 channels: 25,600 bytes an image.
    small = PaDiM(backbone, PaDiMConfig(max_bytes=100_000))
    with pytest.raises(ValueError, match=r"Gaussians of 4 images at 8 x 8 positions x 100 channels needs 100.0 KiB"):
        small.fit(iter(photographs(6, 0).split(1)))
    with pytest.raises(ValueError, match=r"Gaussians of 6 images .* set embedding.target_dim"):
        small.fit(photographs(6, 0).split(1))  # a list says how many come: refused at the first batch
