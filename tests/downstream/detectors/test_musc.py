"""MuSc equals loops over images and patches, with unfolded neighbourhoods and scaled scores as in the authors' code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import SIZE, photographs
from torch import Tensor

from adpretrain.backbones import Backbone
from adpretrain.references import TooFewImages
from downstream.detectors.musc import MuSc, MuScConfig


def neighbourhoods(level: Tensor, degree: int) -> np.ndarray:
    """LayerNorm over the image; r * r * C unfolded values pooled to C; unit length: [N, T, C]."""
    normal = F.layer_norm(level.double(), level.shape[1:])
    unfolded = F.unfold(normal, degree, padding=degree // 2).mT  # C * r * r values, of each channel together
    pooled = F.adaptive_avg_pool1d(unfolded, level.shape[1])
    return F.normalize(pooled, dim=2).numpy()


def mutual_maps(levels: list[Tensor], degrees: list[int], share: float, side: int) -> np.ndarray:
    """For every image and patch, the mean of the lowest distances to the other images; mean of the upsampled maps."""
    images = len(levels[0])
    maps = np.zeros((images, side, side))
    for level in levels:
        for degree in degrees:
            rows_NTC = neighbourhoods(level, degree)
            for i in range(images):
                others = [j for j in range(images) if j != i]
                nearest = [np.linalg.norm(rows_NTC[i][:, None] - rows_NTC[j], axis=2).min(1) for j in others]
                lowest = np.sort(nearest, axis=0)[: max(1, int(share * len(others)))].mean(0)
                grid = torch.from_numpy(lowest).view(1, 1, *level.shape[2:])
                maps[i] += F.interpolate(grid, (side, side), mode="bilinear", align_corners=False)[0, 0].numpy()
    return maps / (len(levels) * len(degrees))


def rescored(scores: np.ndarray, described: np.ndarray, sizes: list[int]) -> np.ndarray:
    """RsCIN of scores scaled to 0..1, then scaled back."""
    low, high = scores.min(), scores.max()
    scaled, similarity, found = (scores - low) / (high - low), described @ described.T, []
    for size in sizes:
        window = np.where(similarity >= np.sort(similarity, 1)[:, -size][:, None], similarity, 0)
        found.append(window / window.sum(1, keepdims=True) @ scaled)
    return np.mean(found, 0) * (high - low) + low


@pytest.mark.parametrize("config", [MuScConfig(), MuScConfig([3], share=0.6, neighbours=[1, 4]), MuScConfig([1], 0.01)])
def test_a_batch_that_scores_itself(backbone: Backbone, config: MuScConfig) -> None:
    images = photographs(7, 0)
    images[2:4, :, 20:40, 20:40] += 1
    found = MuSc(backbone, config).fit(images.split(3)).predict(images)
    levels = backbone(images)
    maps = mutual_maps(levels, config.degrees, config.share, SIZE)
    np.testing.assert_allclose(found.maps.numpy(), maps, rtol=1e-4)
    described = F.normalize(levels[-1].double().mean((2, 3)), dim=1).numpy()
    expected = rescored(maps.reshape(7, -1).max(1), described, config.neighbours)
    np.testing.assert_allclose(found.scores.numpy(), expected, rtol=1e-4)


def test_any_part_of_the_batch_is_scored_as_in_the_whole(backbone: Backbone) -> None:
    """An image is recognised among the kept ones, whatever batch it comes in, and not compared with itself."""
    images = photographs(6, 0)
    detector = MuSc(backbone).fit(images.split(4))
    whole = detector.predict(images)
    for part in ([3], [5, 0]):
        found = detector.predict(images[part])
        torch.testing.assert_close(found.scores, whole.scores[part], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.maps, whole.maps[part], rtol=1e-4, atol=1e-5)
    again = MuSc(backbone).fit([torch.cat([images, images[:2]])]).predict(images[:1])  # a copy does not explain it
    torch.testing.assert_close(again.maps, whole.maps[:1], rtol=0.1, atol=0.01)


def test_a_new_image_is_one_more_of_the_batch_for_its_map(backbone: Backbone) -> None:
    kept, new = photographs(6, 0), photographs(2, 1)
    detector = MuSc(backbone).fit([kept])
    found = detector.predict(new)
    for index in range(2):
        together = torch.cat([kept, new[index : index + 1]])
        expected = mutual_maps(backbone(together), [1, 3, 5], 0.3, SIZE)[-1]
        np.testing.assert_allclose(found.maps[index].numpy(), expected, rtol=1e-4)


def test_defects_among_the_kept_images_are_found(backbone: Backbone) -> None:
    """Nothing says which of the images are normal: three of twelve have a mark, each elsewhere."""
    images = 0.2 * photographs(12, 0) + torch.sin(torch.arange(SIZE) / 3)
    places = {1: (8, 8), 5: (30, 40), 8: (44, 12)}
    for image, (y, x) in places.items():
        images[image, :, y : y + 12, x : x + 12] = 2 * torch.rand(
            3, 12, 12, generator=torch.Generator().manual_seed(image)
        )
    found = MuSc(backbone, MuScConfig(neighbours=[1])).fit(images.split(5)).predict(images)
    assert set(found.scores.topk(3).indices.tolist()) == set(places)
    for image, (y, x) in places.items():
        row, column = divmod(int(found.maps[image].argmax()), SIZE)
        assert abs(row - y - 6) <= 10
        assert abs(column - x - 6) <= 10


def test_mistakes_are_named(backbone: Backbone) -> None:
    for wrong, message in (
        ({"degrees": [2]}, r"degrees \[2\] must be odd"),
        ({"share": 0.0}, r"share 0\.0 of the other images"),
        ({"neighbours": [0]}, r"neighbours \[0\] must be numbers of images"),
    ):
        with pytest.raises(ValueError, match=message):
            MuScConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TooFewImages, match="1 image has no other to be compared with"):
        MuSc(backbone).fit([photographs(1, 0)])
    with pytest.raises(TooFewImages, match="all 3 have the same features: they are one photograph"):
        MuSc(backbone).fit([photographs(1, 0).expand(3, -1, -1, -1)])
    with pytest.raises(ValueError, match=r"the features of 3 images needs .* raise max_bytes"):
        MuSc(backbone, MuScConfig(max_bytes=10_000)).fit([photographs(3, 0)])
