"""ReConPatch Eq. 1 to 7 against loops over pairs, written from the paper, in float64.

Shapes: N patches, D channels.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from downstream.detectors.reconpatch.similarity import (
    contextual_similarity,
    distance_matrix,
    neighbour_sets,
    pairwise_similarity,
    reciprocal_sets,
    relaxed_contrastive_loss,
    scale_embeddings,
    shared_neighbours,
    similarity,
)

N, D = 23, 6


def points(seed: int = 0, count: int = N) -> Tensor:
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distance(a: Tensor, b: Tensor) -> float:
    return math.sqrt(sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True)))


def float64(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def loop_distances(z: Tensor) -> list[list[float]]:
    return [[distance(a, b) for b in z] for a in z]


def loop_near(d: list[list[float]], k: int) -> list[set[int]]:
    return [{j for j in range(len(d)) if row[j] <= sorted(row)[k - 1]} for row in d]


def loop_contextual(d: list[list[float]], k: int) -> NDArray[np.float64]:
    """Eq. 2 to 5."""
    count, near, half = len(d), loop_near(d, k), loop_near(d, max(1, k // 2))
    tilde, hat = np.zeros((count, count)), np.zeros((count, count))
    for i in range(count):
        for j in near[i]:
            tilde[i, j] = len(near[i] & near[j]) / len(near[i])
    for i in range(count):
        reciprocal = [other for other in half[i] if i in half[other]]
        for j in range(count):
            hat[i, j] = sum(tilde[other, j] for other in reciprocal) / len(reciprocal)
    return (hat + hat.T) / 2


def loop_loss(z: Tensor, w: Tensor, margin: float) -> float:
    """Eq. 7."""
    d, total = loop_distances(z), 0.0
    for i in range(len(z)):
        mean = sum(d[i]) / len(z)
        for j in range(len(z)):
            delta = d[i][j] / mean
            total += float(w[i, j]) * delta**2 + (1 - float(w[i, j])) * max(margin - delta, 0.0) ** 2
    return total / len(z)


def test_distances_equal_a_loop_and_hold_at_an_offset() -> None:
    z = points()
    expected = float64(loop_distances(z))
    torch.testing.assert_close(distance_matrix(z), expected, rtol=1e-10, atol=1e-10)
    # Features of a real network lie far from the origin: a plain product in float32 would lose every digit.
    far = (z + 1000).float()
    torch.testing.assert_close(
        distance_matrix(far).double(), torch.cdist(far.double(), far.double()), rtol=1e-4, atol=0
    )


def test_distance_of_equal_rows_is_zero_without_a_gradient() -> None:
    z = points(count=6).float()
    z[3] = z[1]
    z.requires_grad_(True)
    d = distance_matrix(z)
    assert d[1, 3] == 0
    assert (d.diagonal() == 0).all()
    d.sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("sigma", [0.3, 1.0, 7.0])
def test_pairwise_similarity_equals_a_loop(sigma: float) -> None:
    z = points()
    expected = float64([[math.exp(-(distance(a, b) ** 2) / sigma) for b in z] for a in z])
    torch.testing.assert_close(pairwise_similarity(distance_matrix(z), sigma), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("k", [1, 2, 5, 10, N])
def test_neighbour_sets_equal_brute_force_and_scikit_learn(k: int) -> None:
    z = points()
    near = neighbour_sets(distance_matrix(z), k)
    expected = loop_near(loop_distances(z), k)
    assert [set(row.nonzero()[:, 0].tolist()) for row in near] == expected
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(z.numpy())
    assert [set(row) for row in search.kneighbors(z.numpy(), return_distance=False).tolist()] == expected
    reciprocal = reciprocal_sets(near)
    for i in range(N):
        assert set(reciprocal[i].nonzero()[:, 0].tolist()) == {j for j in expected[i] if i in expected[j]}


def test_patches_at_the_same_distance_are_neighbours_together() -> None:
    """On a line 0 1 2 3 4 the second nearest of 2 (after itself) is 1 and 3."""
    line = torch.arange(5.0, dtype=torch.float64)[:, None]
    near = neighbour_sets(distance_matrix(line), 2)
    assert near[2].tolist() == [False, True, True, True, False]
    assert near[0].tolist() == [True, True, False, False, False]
    # Eq. 2 divides by the set's own size, 3 here: N_2(1) = {0, 1, 2} shares 1 and 2 with N_2(2).
    assert float(shared_neighbours(near, torch.float64)[2, 1]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_contextual_similarity_equals_a_loop(k: int) -> None:
    z = points(1)
    expected = torch.from_numpy(loop_contextual(loop_distances(z), k))
    torch.testing.assert_close(contextual_similarity(distance_matrix(z), k), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_similarity_mixes_both_parts(alpha: float) -> None:
    z = points(2)
    mean_square = sum(d * d for row in loop_distances(z) for d in row) / N**2
    d = [[x / math.sqrt(mean_square) for x in row] for row in loop_distances(z)]
    kernel = np.exp(-np.square(d) / 0.7)
    expected = alpha * kernel + (1 - alpha) * loop_contextual(d, 5)
    result = similarity(z, k=5, alpha=alpha, sigma=0.7)
    torch.testing.assert_close(result, torch.from_numpy(expected), rtol=1e-10, atol=1e-10)


def test_scales() -> None:
    z = points(3)
    unit = similarity(z, alpha=1.0, scale="unit")
    cosine = torch.nn.functional.cosine_similarity(z[:, None], z[None], dim=2)
    torch.testing.assert_close(unit, torch.exp(2 * cosine - 2), rtol=1e-9, atol=1e-9)
    assert torch.equal(scale_embeddings(z, "none"), z)
    # The unit of the features does not matter with "mean", and does as printed in the paper.
    torch.testing.assert_close(similarity(40 * z), similarity(z), rtol=1e-10, atol=1e-10)
    assert float(similarity(40 * z, alpha=1.0, scale="none").fill_diagonal_(0).max()) < 1e-20


def test_contexts_tell_groups_apart_where_distance_cannot() -> None:
    """ReConPatch Fig. 2: a pair across two groups and a pair within one, equally far apart."""
    along = torch.linspace(-1, 1, 41, dtype=torch.float64)
    left, right = (torch.stack([torch.full_like(along, x), along], 1) for x in (0.0, 0.7))
    d = distance_matrix(torch.cat([left, right]))
    within, across = (13, 27), (13, 41 + 13)
    assert float(d[within]) == pytest.approx(0.7)
    assert float(d[across]) == pytest.approx(0.7)
    context = contextual_similarity(d, 20)
    assert float(context[within]) > 0.05
    assert float(context[across]) == 0


@pytest.mark.parametrize("margin", [0.5, 1.0, 2.0])
def test_loss_equals_a_loop(margin: float) -> None:
    z, w = points(5), similarity(points(6))
    loss = relaxed_contrastive_loss(z, w, margin)
    assert float(loss) == pytest.approx(loop_loss(z, w, margin), rel=1e-10)


def test_loss_gradient_is_the_difference_quotient() -> None:
    z, w = points(7, 9).requires_grad_(True), similarity(points(8, 9))
    assert torch.autograd.gradcheck(lambda x: relaxed_contrastive_loss(x, w, 0.8), [z], rtol=1e-6, atol=1e-7)


def test_loss_does_not_depend_on_the_unit() -> None:
    z, w = points(9), similarity(points(9))
    loss, small = relaxed_contrastive_loss(z, w), relaxed_contrastive_loss(1e-3 * z, w)
    assert float(small) == pytest.approx(float(loss), rel=1e-9)


def test_equal_patches_give_finite_numbers() -> None:
    """A flat part of a photograph: a batch in which many, or all, embeddings are the same."""
    for z in (torch.ones(12, D), torch.cat([torch.ones(6, D), torch.randn(6, D)])):
        z.requires_grad_(True)
        w = similarity(z)
        loss = relaxed_contrastive_loss(z, w)
        loss.backward()
        assert w.isfinite().all()
        assert loss.isfinite()
        assert z.grad is not None
        assert z.grad.isfinite().all()


def test_a_broken_embedding_is_not_hidden() -> None:
    z = points()
    z[3, 0] = torch.nan
    assert not relaxed_contrastive_loss(z, similarity(points())).isfinite()


def test_single_precision_and_autocast() -> None:
    z = points(10, 200)
    exact = similarity(z, scale="none", sigma=4.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = similarity(z.float(), scale="none", sigma=4.0)
        loss = relaxed_contrastive_loss(z.float(), single)
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-5)
    assert float(loss) == pytest.approx(float(relaxed_contrastive_loss(z, exact)), rel=1e-5)


def test_mistakes_are_named() -> None:
    z = points()
    with pytest.raises(ValueError, match=r"24 neighbours among 23 patches"):
        similarity(z, k=24)
    with pytest.raises(ValueError, match=r"alpha 1.5"):
        similarity(z, alpha=1.5)
    with pytest.raises(ValueError, match=r"sigma 0"):
        similarity(z, sigma=0.0)
    with pytest.raises(ValueError, match=r"scale 'max' is unknown; choose one of mean, unit, none"):
        similarity(z, scale="max")
