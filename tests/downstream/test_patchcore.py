"""PatchCore equals its equations written with numpy: bank, Eq. 6, Eq. 7, map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import SIZE, photographs
from numpy.typing import NDArray
from scipy import ndimage

from adpretrain.backbones import Backbone, load_backbone
from adpretrain.extractor import ADExtractor
from downstream.coreset import greedy_coreset
from downstream.embedding import Embedding, EmbeddingConfig
from downstream.patchcore import PatchCore, PatchCoreConfig


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
        assert torch.equal(detector.bank_ND, everything)
    if method == "greedy":
        assert torch.equal(detector.bank_ND, everything[greedy_coreset(everything, 64)])
    assert len(detector.bank_ND) == (5 * 64 if method == "none" else 64)
    bank = detector.bank_ND.double().numpy()
    for index, rows in enumerate(embedding(backbone(queries)).double().numpy()):
        score, expected = naive(bank, rows, neighbours)
        assert float(found.scores[index]) == pytest.approx(score, rel=1e-4)
        np.testing.assert_allclose(found.maps[index].numpy(), expected, rtol=1e-4)


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
    network = load_backbone("timm/resnet18", pretrained=False, image_size=SIZE, levels=[2, 3])
    detector = PatchCore(network, PatchCoreConfig(amount=20)).fit([photographs(3, 0)])
    assert detector.bank_ND is not None
    assert detector.bank_ND.shape == (20, 384)
    released = PatchCore(network, PatchCoreConfig(EmbeddingConfig(level_dim=100, target_dim=70, form="released")))
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
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
    assert len(first) == 5 * 16
    everything = Embedding()(backbone(normal)).flatten(0, 2)
    assert float(torch.cdist(first, everything).amin(1).max()) < 1e-2


def test_the_projected_choice_covers_nearly_as_well(backbone: Backbone) -> None:
    """Johnson-Lindenstrauss: the farthest row from a coreset chosen in 32 of 117 channels is at most 1.5 times as far
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
    with pytest.raises(ValueError, match=r"bank of 192 patches x 117 channels .* embedding.target_dim"):
        PatchCore(backbone, PatchCoreConfig(max_bank_bytes=50_000)).fit(photographs(3, 0).split(1))
