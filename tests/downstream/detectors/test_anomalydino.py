"""AnomalyDINO by numpy and scipy: distances, rotations, the mask of the foreground."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import SIZE, photographs
from scipy import ndimage
from sklearn.decomposition import PCA
from torch import Tensor

from adpretrain.backbones import Backbone
from downstream.detectors.anomalydino import AnomalyDINO, AnomalyDINOConfig, foreground
from downstream.embedding import EmbeddingConfig
from downstream.inspection.graph import DetectorGraph
from downstream.rotations import turned


@pytest.mark.parametrize(("level", "rotations", "top"), [(-1, 1, 0.0), (0, 1, 0.1), (-1, 8, 0.2)])
def test_equals_a_loop_over_patches(backbone: Backbone, level: int, rotations: int, top: float) -> None:
    normal, queries = photographs(3, 0), photographs(2, 1)
    config = AnomalyDINOConfig(EmbeddingConfig(levels=[level], patch=1), rotations, top=top)
    found = AnomalyDINO(backbone, config).fit(normal.split(2)).predict(queries)
    views = torch.cat([turned(normal, k / rotations) for k in range(rotations)])
    bank, asked = (backbone(x)[level].double().permute(0, 2, 3, 1).numpy() for x in (views, queries))
    bank = bank.reshape(-1, bank.shape[3])
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    asked /= np.linalg.norm(asked, axis=3, keepdims=True)
    for index in range(2):
        grid = np.array([[min(1 - bank @ row) for row in line] for line in asked[index]])
        pixels = F.interpolate(torch.from_numpy(grid)[None, None], (SIZE, SIZE), mode="bilinear", align_corners=False)
        np.testing.assert_allclose(
            found.maps[index].numpy(), ndimage.gaussian_filter(pixels[0, 0].numpy(), 4), rtol=1e-4
        )
        highest = np.sort(grid.ravel())[-max(1, round(top * grid.size)) :].mean()
        assert float(found.scores[index]) == pytest.approx(highest, rel=1e-4)


def test_the_score_is_of_the_patches_in_the_region(backbone: Backbone) -> None:
    """Half of the patches, all images at once or each with its own region: the mean of the highest quarter of these."""
    left = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    left[:, : SIZE // 2] = True
    detector = AnomalyDINO(backbone, AnomalyDINOConfig(rotations=1, top=0.25, sigma=0.0)).fit([photographs(2, 0)])
    queries = photographs(2, 1)
    grids = [backbone(x)[-1].double().permute(0, 2, 3, 1).numpy() for x in (photographs(2, 0), queries)]
    bank, asked = (grid / np.linalg.norm(grid, axis=3, keepdims=True) for grid in grids)
    distance = 1 - (asked @ bank.reshape(-1, bank.shape[3]).T).max(3)
    for roi in (left, torch.stack([left, left.T])):
        found = detector.predict(queries, roi)
        for index in range(2):
            turn = roi.ndim == 3 and index == 1
            half = (distance[index].T if turn else distance[index])[:, : distance.shape[2] // 2].ravel()
            expected = np.sort(half)[-round(0.25 * half.size) :].mean()
            assert float(found.scores[index]) == pytest.approx(expected, rel=1e-4)


def test_a_turned_product_is_normal_only_with_rotations(backbone: Backbone) -> None:
    """A quarter turn is one of the eight; noise has no direction, so stripes are drawn."""
    stripes = torch.sin(torch.arange(SIZE) / 2).expand(1, 3, SIZE, SIZE) + 0.1 * photographs(1, 0)
    upright, lying = stripes.mT, stripes
    scores = [
        float(AnomalyDINO(backbone, AnomalyDINOConfig(rotations=rotations)).fit([lying]).predict(upright).scores)
        for rotations in (1, 8)
    ]
    assert scores[1] < scores[0] / 3


def scene(seed: int, side: int = 20) -> tuple[Tensor, np.ndarray]:
    """Patches [H, W, D] of a disc before a background: its features differ from the others by much more than noise."""
    generator = torch.Generator().manual_seed(seed)
    ys, xs = np.mgrid[:side, :side]
    disc = (ys - side / 2) ** 2 + (xs - side / 2) ** 2 < (0.4 * side) ** 2
    direction = torch.randn(6, generator=generator)
    noise = torch.randn(side, side, 6, generator=generator)
    return noise + 20 * torch.from_numpy(disc).float()[..., None] * direction / direction.norm(), disc


def by_sklearn(rows_HWD: Tensor, threshold: float) -> np.ndarray:
    """The mask in the words of the paper's code: first component, its sign by the centre, dilated, closed."""
    height, width, channels = rows_HWD.shape
    first = PCA(1, svd_solver="full").fit_transform(rows_HWD.reshape(-1, channels).numpy())[:, 0].reshape(height, width)
    centre = np.s_[int(height * 0.2) : int(height * 0.8), int(width * 0.2) : int(width * 0.8)]
    mask = first > threshold
    if mask[centre].mean() <= 0.35:
        mask = -first > threshold
    square = np.ones((3, 3), bool)
    mask = ndimage.binary_dilation(ndimage.binary_dilation(mask, square), square)
    return ndimage.binary_erosion(mask, square, border_value=1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("threshold", [0.5, 8.0])
def test_the_foreground_is_that_of_the_papers_code(seed: int, threshold: float) -> None:
    rows, disc = scene(seed)
    found = foreground(rows, torch.ones(20, 20, dtype=torch.bool), threshold).numpy()
    np.testing.assert_array_equal(found, by_sklearn(rows, threshold))
    assert found[disc].all()
    if threshold == 8.0:  # what closing adds to the dilated disc are corners, and what is between it and the border
        assert not found[~ndimage.binary_dilation(disc, np.ones((3, 3)), 2)].any()
    wide = rows @ torch.eye(6, 500)  # more channels than patches: the other product of the matrix
    np.testing.assert_array_equal(foreground(wide, torch.ones(20, 20, dtype=torch.bool), threshold).numpy(), found)


def test_without_a_clear_foreground_nothing_is_masked() -> None:
    rows, _ = scene(0)
    everywhere = torch.ones(20, 20, dtype=torch.bool)
    assert bool(foreground(rows, everywhere, 1e3).all())
    inside = torch.arange(20).expand(20, 20) < 12
    part = foreground(rows, inside, 1.0)  # patches outside do not matter
    spoilt = torch.where(
        inside[..., None], rows, 1e4 * torch.rand(20, 20, 6, generator=torch.Generator().manual_seed(0))
    )
    assert torch.equal(part, foreground(spoilt, inside, 1.0))
    assert bool(part.any())
    assert not bool((part & ~inside).any())


def test_masked_patches_count_for_nothing() -> None:
    """An anomaly on the background is not seen with masking; one on the product is seen with and without."""
    rows, _ = scene(1)

    def extract(images: Tensor) -> list[Tensor]:
        spots = F.adaptive_max_pool2d(images[:, :1], 20)[:, 0]  # what was painted into the image, as a feature
        painted = torch.cat([rows.expand(len(images), -1, -1, -1), 30 * spots[..., None]], 3)
        return [painted.permute(0, 3, 1, 2)]

    plain, corner, middle = torch.zeros(3, 1, 3, 40, 40)
    corner[:, 0, 2, 2] = middle[:, 0, 20, 20] = 1
    normal = plain - 1e-3  # images of non-negative values only would look unprepared
    for masking, seen in ((None, (True, True)), (8.0, (False, True))):
        detector = AnomalyDINO(extract, AnomalyDINOConfig(rotations=1, masking=masking, sigma=1.0)).fit([normal])
        base = float(detector.predict(normal).scores)
        scores = [float(detector.predict(image - 1e-3).scores) for image in (corner, middle)]
        assert tuple(score > base + 0.1 for score in scores) == seen
    assert float(detector.predict(corner - 1e-3).maps[0, :4, :4].max()) < 0.05


def test_mistakes_are_named(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match=r"masking -1\.0 must be a threshold"):
        AnomalyDINOConfig(masking=-1.0)
    with pytest.raises(ValueError, match="rotations 0 must be at least 1"):
        AnomalyDINOConfig(rotations=0)
    with pytest.raises(ValueError, match=r"memory bank of 256 patches .* raise max_bank_bytes"):
        AnomalyDINO(backbone, AnomalyDINOConfig(max_bank_bytes=50_000)).fit(photographs(2, 0).split(1))
    with pytest.raises(ValueError, match="masking cannot be exported"):
        DetectorGraph(AnomalyDINO(backbone, AnomalyDINOConfig(masking=1.0)).fit([photographs(1, 0)]))
