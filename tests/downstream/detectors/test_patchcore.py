"""PatchCore equals its equations written with numpy: bank, Eq. 6, Eq. 7, map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import SIZE, photographs
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from adpretrain.backbones import Backbone, FeatureMaps, load_backbone
from adpretrain.extractor import ADExtractor
from downstream.coreset import greedy_coreset
from downstream.detectors.patchcore import ADPRETRAIN, PatchCore, PatchCoreConfig
from downstream.embedding import Embedding, EmbeddingConfig


def naive(
    bank_ND: NDArray[np.float64], rows_HWD: NDArray[np.float64], neighbours: int, sigma: float = 4.0
) -> tuple[float, NDArray[np.float64]]:
    """Score and map of one image, patch by patch."""
    height, width, _ = rows_HWD.shape
    grid, matches = np.empty((height, width)), np.empty((height, width), dtype=int)
    for h in range(height):
        for w in range(width):
            distances = np.linalg.norm(bank_ND - rows_HWD[h, w], axis=1)
            matches[h, w], grid[h, w] = distances.argmin(), distances.min()
    place = np.unravel_index(grid.argmax(), grid.shape)
    score = float(grid[place])
    if neighbours:
        star = bank_ND[matches[place]]
        around = np.argsort(np.linalg.norm(bank_ND - star, axis=1), kind="stable")[:neighbours]
        others = np.exp(np.linalg.norm(bank_ND[around] - rows_HWD[place], axis=1))
        score *= 1 - np.exp(score) / others.sum()
    pixels = F.interpolate(torch.from_numpy(grid)[None, None], (SIZE, SIZE), mode="bilinear", align_corners=False)
    return score, ndimage.gaussian_filter(pixels[0, 0].numpy(), sigma)


@pytest.mark.parametrize("neighbours", [0, 2, 9])
@pytest.mark.parametrize("method", ["none", "greedy", "random"])
def test_equals_the_equations(backbone: Backbone, method: str, neighbours: int) -> None:
    config = PatchCoreConfig(amount=0.2, method=method, projection_dim=None, reweight=neighbours)  # type: ignore[arg-type]
    normal, queries = photographs(5, 0), photographs(3, 1)
    detector = PatchCore(backbone, config).fit(normal.split(2))
    found = detector.predict(queries)

    embedding = Embedding(config.embedding)
    everything = embedding(backbone(normal)).flatten(0, 2)
    assert detector.bank_ND is not None
    if method == "none":
        torch.testing.assert_close(detector.bank_ND, everything, rtol=1e-4, atol=1e-4)
    if method == "greedy":
        expected_ND = everything[greedy_coreset(everything, 64)]
        torch.testing.assert_close(detector.bank_ND, expected_ND, rtol=1e-4, atol=1e-4)
    assert len(detector.bank_ND) == (5 * 64 if method == "none" else 64)
    bank = detector.bank_ND.double().numpy()
    for index, rows in enumerate(embedding(backbone(queries)).double().numpy()):
        score, expected = naive(bank, rows, neighbours)
        assert float(found.scores[index]) == pytest.approx(score, rel=1e-4)
        np.testing.assert_allclose(found.maps[index].numpy(), expected, rtol=1e-4)


def released_patches(levels: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Patch vectors of one image as the released evaluation makes them, patch by patch: [H * W, 1024].

    The 3 x 3 neighbourhood of a level (zeros beyond the border), C * 9 values in the order channel, row, column, cut
    into 1024 windows that are averaged; levels upsampled to the finest grid; the windows of all levels one after the
    other, cut into 1024 windows again.
    """

    def windows(values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
        size = len(values)
        bounds = [(size * i // count, -(-size * (i + 1) // count)) for i in range(count)]
        return np.array([values[first:last].mean() for first, last in bounds])

    finest = max(level.shape[1] for level in levels)
    joined = []
    for level_CHW in levels:
        _, height, width = level_CHW.shape
        padded = np.pad(level_CHW, ((0, 0), (1, 1), (1, 1)))
        pooled_HWD = np.array(
            [[windows(padded[:, h : h + 3, w : w + 3].ravel(), 1024) for w in range(width)] for h in range(height)]
        )
        grid = torch.from_numpy(pooled_HWD).permute(2, 0, 1)[None]
        same = F.interpolate(grid, (finest, finest), mode="bilinear", align_corners=False)[0]
        joined.append(same.flatten(1).T.numpy())
    return np.array([windows(np.concatenate(patch), 1024) for patch in zip(*joined, strict=True)])


def test_the_evaluation_of_adpretrain(backbone: Backbone) -> None:
    """The last three levels, 1024 channels, one neighbour, squared distances, bilinear, sigma 4."""

    def pyramid(images: Tensor) -> FeatureMaps:  # 8 x 8, 4 x 4, 2 x 2 and 1 x 1 patches
        fine = backbone(images)[0]
        return [F.avg_pool2d(fine, 2**number) for number in range(4)]

    normal, queries = photographs(4, 0), photographs(2, 1)
    detector = PatchCore(pyramid, ADPRETRAIN).fit([normal])
    found = detector.predict(queries)
    rows = [
        [released_patches([level[i].double().numpy() for level in pyramid(images)[-3:]]) for i in range(len(images))]
        for images in (normal, queries)
    ]
    assert detector.bank_ND is not None
    bank, everything = detector.bank_ND.double().numpy(), np.concatenate(rows[0])
    to_bank = np.array([np.linalg.norm(everything - row, axis=1).min() for row in bank])
    assert to_bank.max() < 1e-4 * np.linalg.norm(everything, axis=1).mean()  # the bank is made of these patches
    for index, patches in enumerate(rows[1]):
        squares = np.array([((bank - patch) ** 2).sum(1).min() for patch in patches])
        side = int(len(squares) ** 0.5)
        grid = torch.from_numpy(squares).view(1, 1, side, side)
        pixels = F.interpolate(grid, (SIZE, SIZE), mode="bilinear", align_corners=False)[0, 0].numpy()
        np.testing.assert_allclose(found.maps[index].numpy(), ndimage.gaussian_filter(pixels, 4), rtol=1e-3)
        assert float(found.scores[index]) == pytest.approx(squares.max(), rel=1e-3)


def test_reweighting_is_stable(backbone: Backbone) -> None:
    """Distances of thousands, whose exponentials overflow even in float64: the weight is the others' share."""
    config = PatchCoreConfig(method="none", reweight=3)
    detector = PatchCore(lambda images: [10_000 * level for level in backbone(images)], config)
    detector.fit([photographs(2, 0)])
    plain = PatchCore(detector.extract, PatchCoreConfig(method="none", reweight=0)).fit([photographs(2, 0)])
    query = photographs(2, 1)
    weighted, maximum = detector.predict(query).scores, plain.predict(query).scores
    assert float(maximum.min()) > 800
    assert bool(weighted.isfinite().all())
    assert bool((weighted <= maximum).all())
    assert bool((weighted > 0).all())


def test_an_image_of_the_bank_has_distance_zero(backbone: Backbone) -> None:
    normal = photographs(3, 0)
    found = PatchCore(backbone, PatchCoreConfig(method="none")).fit([normal]).predict(normal)
    assert torch.equal(found.maps, torch.zeros_like(found.maps))
    assert torch.equal(found.scores, torch.zeros(3))


def test_one_swapped_argument(backbone: Backbone) -> None:
    """The paper's comparison: with and without pretrained features."""
    normal, queries = photographs(6, 0), photographs(2, 1)
    extractor = ADExtractor(backbone).set_references(normal[:2])
    config = PatchCoreConfig(amount=0.3)
    without, with_ours = (PatchCore(extract, config).fit([normal[2:]]) for extract in (backbone, extractor))
    assert without.bank_ND is not None
    assert with_ours.bank_ND is not None
    assert without.bank_ND.shape == with_ours.bank_ND.shape
    torch.testing.assert_close(
        PatchCore(extractor, PatchCoreConfig(method="none")).fit([normal[2:]]).bank_ND,
        Embedding()(extractor(normal[2:])).flatten(0, 2),
    )
    assert without.predict(queries).maps.shape == with_ours.predict(queries).maps.shape == (2, SIZE, SIZE)


def test_the_papers_hierarchies() -> None:
    """Blocks 2 and 3 of a residual network at 64 pixels: 8 x 8 patches of 128 + 256 channels."""
    torch.manual_seed(0)
    network = load_backbone("timm/resnet18", pretrained=False, image_size=SIZE)
    detector = PatchCore(network, PatchCoreConfig(amount=20)).fit([photographs(3, 0)])
    assert detector.bank_ND is not None
    assert detector.bank_ND.shape == (20, 384)
    pooled = EmbeddingConfig([1, 2], level_dim=100, target_dim=70, form="released")
    released = PatchCore(network, PatchCoreConfig(pooled))
    assert released.fit([photographs(3, 0)]).predict(photographs(1, 1)).maps.isfinite().all()
    assert released.bank_ND is not None
    assert released.bank_ND.shape == (19, 70)


def test_a_mark_is_found_where_it_is(backbone: Backbone) -> None:
    normal = photographs(8, 0) * 0.05 + 0.5
    marked = (photographs(1, 3) * 0.05 + 0.5).clone()
    marked[:, :, 40:52, 8:20] = 0
    detector = PatchCore(backbone).fit(normal.split(3))
    good, bad = detector.predict(photographs(4, 2) * 0.05 + 0.5), detector.predict(marked)
    assert bad.scores[0] > 2 * good.scores.max()
    y, x = divmod(int(bad.maps[0].argmax()), SIZE)
    assert 36 <= y < 56
    assert 4 <= x < 24


def test_a_share_of_the_patches(backbone: Backbone) -> None:
    """Drawn by image, so that batches do not matter; the rows are those of the images."""
    normal = photographs(5, 0)
    config = PatchCoreConfig(method="none", keep=0.25)
    first, second = (PatchCore(backbone, config).fit(normal.split(size)).bank_ND for size in (5, 2))
    assert first is not None
    assert second is not None
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    assert len(first) == 5 * 16
    everything = Embedding()(backbone(normal)).flatten(0, 2)
    apart = torch.cdist(first, everything, compute_mode="donot_use_mm_for_euclid_dist")  # its product would round
    assert float(apart.amin(1).max()) < 1e-3


def test_the_projected_choice_covers_nearly_as_well(backbone: Backbone) -> None:
    """Johnson-Lindenstrauss: the farthest row from a coreset chosen in 32 of 152 channels is at most 1.5 times as far
    as with all, and nearer than with a random choice."""
    normal = photographs(6, 0)
    everything = Embedding()(backbone(normal)).flatten(0, 2)

    def reach(**options: object) -> float:
        bank = PatchCore(backbone, PatchCoreConfig(amount=40, **options)).fit([normal]).bank_ND  # type: ignore[arg-type]
        assert bank is not None
        return float(torch.cdist(everything, bank).amin(1).max())

    exact, projected = reach(projection_dim=None), reach(projection_dim=32)
    assert exact <= projected < 1.5 * exact
    assert exact < reach(method="random")


def test_approximate_search(backbone: Backbone) -> None:
    """IVFPQ never reports less than the exact distance, and about the same on the whole."""
    pytest.importorskip("faiss")
    normal, queries = photographs(8, 0), photographs(2, 1)
    exact, near = (
        PatchCore(backbone, PatchCoreConfig(method="none", reweight=0, search=search)).fit([normal]).predict(queries)
        for search in ("exact", "ivfpq")
    )  # type: ignore[attr-defined]
    assert bool((near.maps >= exact.maps - 1e-4).all())
    assert float((near.maps / exact.maps).mean()) < 1.2


def test_mistakes_are_named(backbone: Backbone) -> None:
    for options, message in (
        ({"method": "kmeans"}, "method 'kmeans' is unknown; choose one of"),
        ({"search": "hnsw"}, "search 'hnsw' is unknown"),
        ({"keep": 0.0}, "keep 0.0 must be a share"),
        ({"reweight": 1}, "reweight 1 must be 0"),
    ):
        with pytest.raises(ValueError, match=message):
            PatchCoreConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"amount 1\.5; expected a share"):
        PatchCore(backbone, PatchCoreConfig(amount=1.5)).fit([photographs(1, 0)])
    with pytest.raises(ValueError, match=r"bank of 192 patches x 152 channels .* embedding.target_dim"):
        PatchCore(backbone, PatchCoreConfig(max_bank_bytes=50_000)).fit(photographs(3, 0).split(1))
