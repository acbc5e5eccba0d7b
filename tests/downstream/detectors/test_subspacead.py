"""SubspaceAD equals the reconstruction error of scikit-learn's PCA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import SIZE, photographs
from scipy import ndimage
from sklearn.decomposition import PCA

from adpretrain.backbones import Backbone
from downstream.detectors.subspacead import SubspaceAD, SubspaceADConfig
from downstream.embedding import Embedding, EmbeddingConfig
from downstream.rotations import turned
from downstream.subspace import Scatter, outside


def rows(count: int, seed: int, width: int = 30) -> np.ndarray:
    """Variances of 1 to 1e-6, far from the origin, where products of rows cancel."""
    draws = np.random.default_rng(seed).normal(size=(count, width))
    return (
        1000 + draws * np.logspace(0, -3, width) @ np.linalg.qr(np.random.default_rng(9).normal(size=(width,) * 2))[0]
    )


@pytest.mark.parametrize("variance", [0.5, 0.99, 0.99999, 1, 7, 29])
@pytest.mark.parametrize("count", [20, 400])
def test_the_subspace_is_that_of_scikit_learn(variance: float, count: int) -> None:
    """Also with fewer rows than channels; in float64, to 1e-6 of the deviation of the rows."""
    normal, new = rows(count, 0), rows(50, 1)
    if variance == 29 and count == 20:
        pytest.skip("scikit-learn finds no more components than rows")
    pca = PCA(variance, svd_solver="full").fit(normal)
    scatter = Scatter()
    for batch in torch.from_numpy(normal).split(7):
        scatter.add(batch)
    mean_D, basis_Dk = scatter.subspace(variance)
    assert basis_Dk.shape[1] == pca.n_components_
    expected = np.linalg.norm(new - pca.inverse_transform(pca.transform(new)), axis=1)
    np.testing.assert_allclose(outside(torch.from_numpy(new), mean_D, basis_Dk).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("rotations", [1, 4])
def test_maps_and_scores_by_hand(backbone: Backbone, rotations: int) -> None:
    normal, queries = photographs(4, 0), photographs(2, 1)
    config = SubspaceADConfig(variance=0.9, rotations=rotations, top=0.02)
    found = SubspaceAD(backbone, config).fit(normal.split(3)).predict(queries)
    embedding = Embedding(EmbeddingConfig(levels=None, patch=1))
    views = torch.cat([turned(normal, k / rotations) for k in range(rotations)])
    known, asked = (embedding(backbone(x)).double().numpy() for x in (views, queries))
    pca = PCA(0.9, svd_solver="full").fit(known.reshape(-1, known.shape[3]))
    flat = asked.reshape(-1, asked.shape[3])
    error = np.linalg.norm(flat - pca.inverse_transform(pca.transform(flat)), axis=1).reshape(asked.shape[:3])
    pixels = F.interpolate(torch.from_numpy(error)[:, None], (SIZE, SIZE), mode="bilinear", align_corners=False)
    for index in range(2):
        expected = ndimage.gaussian_filter(pixels[index, 0].numpy(), 4)
        np.testing.assert_allclose(found.maps[index].numpy(), expected, rtol=1e-4)
        highest = np.sort(expected.ravel())[-round(0.02 * SIZE**2) :].mean()
        assert float(found.scores[index]) == pytest.approx(highest, rel=1e-4)


def test_normal_variation_is_not_anomalous_and_anything_else_is() -> None:
    """Rows move along one direction only: any length along it scores 0, a step aside its length."""
    along = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None] * torch.tensor([3.0, 4.0, 0.0])
    scatter = Scatter()
    scatter.add(along)
    mean_D, basis_Dk = scatter.subspace(0.99)
    new = torch.tensor([[30.0, 40.0, 0.0], [0.0, 0.0, 2.0], [30.0, 40.0, -5.0], [-4.0, 3.0, 0.0]]).double()
    torch.testing.assert_close(outside(new, mean_D, basis_Dk), torch.tensor([0.0, 2.0, 5.0, 5.0]).double())
    still = Scatter()
    still.add(torch.ones(4, 3))
    torch.testing.assert_close(outside(new, *still.subspace(0.9)), (new - 1).norm(dim=1))


def test_memory_does_not_grow_with_the_images() -> None:
    scatter = Scatter()
    for seed in range(5):
        scatter.add(torch.from_numpy(rows(100, seed)))
        held = sum(value.nbytes for value in vars(scatter).values() if isinstance(value, torch.Tensor))
        assert held == 8 * (30 * 30 + 2 * 30)


def test_mistakes_are_named(backbone: Backbone) -> None:
    for variance in (0, 0.0, 1.0, -1, 2.5):
        with pytest.raises(ValueError, match=f"variance {variance} must be a share between 0 and 1"):
            SubspaceADConfig(variance=variance)
    with pytest.raises(ValueError, match="rotations 0 must be at least 1"):
        SubspaceADConfig(rotations=0)
    with pytest.raises(ValueError, match=r"top 1\.5 must be a share"):
        SubspaceADConfig(top=1.5)
    with pytest.raises(ValueError, match=r"variance 152 takes 152 of the features' 152 directions"):
        SubspaceAD(backbone, SubspaceADConfig(variance=152)).fit([photographs(2, 0)])
