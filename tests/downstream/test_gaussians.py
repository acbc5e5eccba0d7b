"""Streamed Gaussians equal numpy's covariances and scipy's Mahalanobis distances, position by position."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import mahalanobis
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from downstream.gaussians import Gaussians, Moments, _cholesky

EPS = 0.01


def samples(images: int, positions: int, width: int, seed: int = 0, offset: float = 0.0) -> Tensor:
    """Correlated features [n, P, D], their scales from 0.05 to 2."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(positions, width, width, generator=rng) / width**0.5
    rows = torch.randn(images, positions, width, generator=rng) * torch.linspace(0.05, 2, width)
    return offset + torch.einsum("npd,pde->npe", rows, mixing)


def fitted(rows: Tensor, batch: int = 7, expected: int | None = None) -> Gaussians:
    moments = Moments(expected)
    for part in rows.split(batch):
        moments.add(part)
    return moments.gaussians(EPS)


def naive_distances(rows: Tensor, queries: Tensor) -> NDArray[np.float64]:
    """np.cov and an explicit inverse of every position in float64, as public PaDiM code has it."""
    out = np.empty(queries.shape[:2])
    for position in range(rows.shape[1]):
        normal = rows[:, position].double().numpy()
        inverse = np.linalg.inv(np.cov(normal, rowvar=False) + EPS * np.eye(normal.shape[1]))
        for image, query in enumerate(queries[:, position].double().numpy()):
            out[image, position] = mahalanobis(query, normal.mean(0), inverse)
    return out


@pytest.mark.parametrize("images", [2, 5, 23, 24, 25, 26, 150], ids="n{}".format)
@pytest.mark.parametrize("known", [None, 0, 6], ids="known{}".format)
def test_distances_in_every_regime(images: int, known: int | None) -> None:
    """Fewer, as many, and more images than the 24 channels; several foldings; batches that do not divide n; whether
    their number is known beforehand, exactly or as a bound."""
    rows, queries = samples(images, 5, 24), samples(4, 5, 24, seed=9)
    expected = None if known is None else images + known
    found = fitted(rows, expected=expected)
    assert found.low_rank == ((expected or images) <= 24)
    assert found.factor_PFD.shape[1] == (images if found.low_rank else 24)
    np.testing.assert_allclose(found.distances(queries).numpy(), naive_distances(rows, queries), rtol=2e-4)
    # The images it was fitted on, where the low-rank form subtracts nearly equal numbers.
    np.testing.assert_allclose(found.distances(rows[:3]).numpy(), naive_distances(rows, rows[:3]), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("batches", [(1, 2, 1), (3, 8), (2, 40), (1, 11, 30)], ids=str)
def test_no_image_is_lost_when_the_first_batch_is_not_the_largest(batches: tuple[int, ...]) -> None:
    """Batches of several products, the first with few images: their number times its size is too few."""
    rows, queries = samples(sum(batches), 5, 24), samples(4, 5, 24, seed=9)
    moments = Moments(expected=len(batches) * batches[0])
    for part in rows.split(list(batches)):
        moments.add(part)
    found = moments.gaussians(EPS)
    assert found.low_rank == (len(rows) <= 24)
    np.testing.assert_allclose(found.distances(queries).numpy(), naive_distances(rows, queries), rtol=2e-4)


@pytest.mark.parametrize("images", [10, 60])
def test_a_large_mean_costs_no_precision(images: int) -> None:
    """Features around 1000 with deviations of about 1: the sum of squares alone would lose the variance in float32."""
    rows, queries = samples(images, 3, 16, offset=1000.0), samples(2, 3, 16, seed=1, offset=1000.0)
    np.testing.assert_allclose(fitted(rows).distances(queries).numpy(), naive_distances(rows, queries), rtol=2e-3)


@pytest.mark.parametrize(("scale", "tolerance"), [(1, 1e-3), (10, 1e-3), (100, 0.05)])
def test_images_it_was_fitted_on_are_as_far_as_they_are_at_any_scale(scale: float, tolerance: float) -> None:
    """Woodbury's form subtracts two squares that agree to (eps / scale^2) of themselves."""
    rng = torch.Generator().manual_seed(0)
    rows, queries = (scale * torch.randn(count, 3, 100, generator=rng) for count in (40, 4))
    found = fitted(rows)
    assert found.low_rank
    np.testing.assert_allclose(found.distances(rows).numpy(), naive_distances(rows, rows), rtol=tolerance)
    np.testing.assert_allclose(found.distances(queries).numpy(), naive_distances(rows, queries), rtol=1e-5)
    mixed = found.distances(torch.cat([queries, rows[:1]]))  # one that cancels beside others that do not
    torch.testing.assert_close(mixed[:4], found.distances(queries), rtol=1e-5, atol=0.0)


def test_the_order_and_size_of_batches_do_not_matter() -> None:
    rows, queries = samples(40, 4, 12), samples(3, 4, 12, seed=2)
    first, second = fitted(rows, batch=40), fitted(rows.flip(0), batch=1)
    torch.testing.assert_close(first.distances(queries), second.distances(queries), rtol=1e-4, atol=1e-5)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("width", [64, 192, 256, 400])
def test_the_batched_solvers_are_right_here(width: int) -> None:
    """Residuals of what is relied upon, at the sizes and threads where batched inv and solve were wrong on a CPU."""
    rows = samples(2 * width, 6, width).double().transpose(0, 1)
    matrix = rows.mT @ rows / (2 * width)
    factor = _cholesky(matrix.clone(), EPS)
    shifted = matrix + EPS * torch.eye(width, dtype=torch.float64)
    assert float((factor @ factor.mT - shifted).norm() / shifted.norm()) < 1e-13
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        right = torch.randn(6, width, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
        solution = torch.linalg.solve_triangular(factor.to(dtype), right, upper=False)
        assert float((factor.to(dtype) @ solution - right).norm() / right.norm()) < tolerance


def test_triangles_of_several_panels() -> None:
    """150 channels make three panels; more images, a single one left over."""
    rows, queries = samples(200, 3, 150), samples(2, 3, 150, seed=5)
    found = fitted(rows, batch=199).distances(queries).numpy()
    np.testing.assert_allclose(found, naive_distances(rows, queries), rtol=1e-3)


def test_whitened_normal_images_have_the_size_theory_says() -> None:
    """For many Gaussian images of D channels d^2 is chi-squared: mean D, variance 2 D (eps is small against them)."""
    rows = torch.randn(4000, 2, 20, generator=torch.Generator().manual_seed(3))
    squared = fitted(rows, batch=500).distances(rows).square()
    assert abs(float(squared.mean()) / 20 - 1) < 0.02
    assert abs(float(squared.var()) / 40 - 1) < 0.1


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        fitted(samples(1, 2, 4))
    with pytest.raises(ValueError, match="at least 2 images, got 0"):
        Moments().gaussians(EPS)
    with pytest.raises(ValueError, match=r"expected rows of 2 positions x 4 channels, got \(3, 5, 4\)"):
        fitted(samples(9, 2, 4)).distances(samples(3, 5, 4))
    moments = Moments()
    moments.add(torch.zeros(9, 2, 4))
    with pytest.raises(ValueError, match="eps 0 is too small"):
        moments.gaussians(0)


def test_a_device_without_float64_is_refused() -> None:
    with FakeTensorMode(), pytest.raises(ValueError, match="MPS does not support: choose device 'cpu'"):
        Moments().add(torch.empty(2, 3, 4, device="mps"))
