"""Choosing references: seeded, spread, and semantically aligned (ADPretrain App. C) against a naive loop."""

import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from adpretrain.references import AlignedReferences, kmeans_references, random_references


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_random_references_are_distinct_seeded_and_uniform() -> None:
    assert random_references(30, 8, seed=3) == random_references(30, 8, seed=3)
    draws = [random_references(10, 3, seed=seed) for seed in range(2000)]
    assert all(len(set(draw)) == 3 and set(draw) <= set(range(10)) for draw in draws)
    counts = np.bincount(np.concatenate(draws), minlength=10)
    assert abs(counts - 600).max() < 5 * math.sqrt(2000 * 0.3 * 0.7)  # five standard deviations
    assert random_references(4, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize(("pool", "shots"), [(3, 4), (3, 0), (0, 1)])
def test_a_count_that_the_pool_cannot_give_is_refused(pool: int, shots: int) -> None:
    with pytest.raises(ValueError, match=rf"K = {shots} references .* pool of {pool} images"):
        random_references(pool, shots)
    if pool:
        with pytest.raises(ValueError, match=rf"K = {shots} references .* pool of {pool} images"):
            kmeans_references(normal(pool, 4, 2, 2), shots)
    with pytest.raises(ValueError, match="pool of 3 images"):
        kmeans_references(normal(3, 4, 2, 2), 1, clusters=4)


def clustered_pool() -> tuple[Tensor, list[list[int]]]:
    """Images of three far-apart appearances (10, 7 and 4 of them, shuffled) at different distances to the middle.

    Returns [21, 3, 2, 2] and the members of each appearance, the nearest to its mean first.
    """
    rng = np.random.default_rng(0)
    offsets = np.concatenate([rng.normal(0, 1, size) for size in (10, 7, 4)])
    label = np.repeat([0, 1, 2], [10, 7, 4])
    order = rng.permutation(21)
    offsets, label = offsets[order], label[order]
    values = 100.0 * np.eye(3)[label]
    values[:, 0] += offsets
    images = torch.from_numpy(values).float()[:, :, None, None].expand(-1, -1, 2, 2)
    members = []
    for appearance in range(3):
        own = np.flatnonzero(label == appearance)
        members.append(sorted(own, key=lambda i: abs(offsets[i] - offsets[own].mean())))
    return images, members


@pytest.mark.parametrize("shots", [3, 6, 8, 14, 21])
def test_kmeans_spreads_evenly_and_takes_the_nearest_to_each_centre(shots: int) -> None:
    images, members = clustered_pool()
    share = [0, 0, 0]
    while sum(share) < shots:  # one to each in turn, the largest first, an exhausted one passes
        for appearance in range(3):
            if share[appearance] < len(members[appearance]) and sum(share) < shots:
                share[appearance] += 1
    expected = sorted(int(i) for own, count in zip(members, share, strict=True) for i in own[:count])
    assert kmeans_references(images, shots, clusters=3) == expected
    assert kmeans_references(images, shots, clusters=3, seed=1) == expected


def test_kmeans_takes_one_image_of_each_cluster_by_default_and_sees_texture() -> None:
    images, members = clustered_pool()
    chosen = kmeans_references(images, 3)
    assert [len(set(own) & set(chosen)) for own in members] == [1, 1, 1]
    # Equal means, but half of the images are flat and half are checkered: the deviation over tokens tells.
    checkered = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).expand(6, 1, 2, 2)
    pool = torch.cat([torch.zeros(6, 1, 2, 2), checkered]) + 0.01 * normal(12, 1, 2, 2)
    first, second = kmeans_references(pool, 2)
    assert first < 6 <= second


def naive_distances(pool: Tensor, query: Tensor, cells: int, centres: int, seed: int) -> np.ndarray:
    """App. C with explicit loops: [B, P]."""

    def cell_tokens(image: np.ndarray, u: int, v: int) -> np.ndarray:
        height, width = image.shape[1] // cells, image.shape[2] // cells
        top, left = (image.shape[1] - height * cells) // 2, (image.shape[2] - width * cells) // 2
        ys, xs = range(top + u * height, top + (u + 1) * height), range(left + v * width, left + (v + 1) * width)
        return np.stack([image[:, y, x] for y in ys for x in xs])

    grid = [(u, v) for u in range(cells) for v in range(cells)]
    codebook = []
    for u, v in grid:  # N_c centres of each cell, over all normal images
        own = np.concatenate([cell_tokens(image, u, v) for image in pool.numpy()])
        codebook += list(KMeans(centres, n_init=3, random_state=seed).fit(own).cluster_centers_)

    def histogram(token: np.ndarray) -> list[float]:
        bins = [(1 + float(token @ c) / (np.linalg.norm(token) * np.linalg.norm(c))) / 2 + 1e-8 for c in codebook]
        return [value / sum(bins) for value in bins]

    def described(images: Tensor) -> list[list[list[list[float]]]]:
        return [
            [[histogram(t) for t in cell_tokens(image, u, v)] for u, v in grid] for image in images.double().numpy()
        ]

    normals, queries = described(pool), described(query)
    distance = np.zeros((len(queries), len(normals)))
    for b, one in enumerate(queries):
        for i, other in enumerate(normals):
            worst = [
                max(
                    sum(p * math.log(p / q) for p, q in zip(h_pool, h_query, strict=True))
                    for h_pool, h_query in zip(other[cell], one[cell], strict=True)
                )
                for cell in range(len(grid))
            ]
            distance[b, i] = sum(worst) / len(grid)  # Eq. 9
    return distance


@pytest.mark.parametrize("size", [(6, 6), (7, 9)])
def test_alignment_is_equations_8_and_9(size: tuple[int, int]) -> None:
    pool, query = normal(5, 4, *size), normal(2, 4, *size, seed=1)
    expected = naive_distances(pool, query, cells=3, centres=2, seed=0)
    aligned = AlignedReferences(pool, cells=3, centres=2)
    np.testing.assert_allclose(aligned.distances(query).numpy(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(aligned.choose(query, 3), torch.from_numpy(expected).argsort(1)[:, :3])
    assert aligned.choose(query[:1], 5).shape == (1, 5)


def test_of_shifted_copies_the_unshifted_one_is_chosen() -> None:
    """A part photographed at several positions: the reference of a query is the photograph at its own position."""
    scene = normal(1, 8, 40, 40)
    scene = torch.nn.functional.avg_pool2d(scene, 5, stride=1)  # smooth, as features of a photograph are
    shifts = [(0, 0), (0, 6), (6, 0), (6, 6), (3, 3), (12, 9)]
    pool = torch.cat([scene[:, :, y : y + 20, x : x + 20] for y, x in shifts])
    aligned = AlignedReferences(pool)
    query = pool + 0.05 * normal(*pool.shape, seed=1)
    assert aligned.choose(query, 1)[:, 0].tolist() == list(range(len(shifts)))
    own = aligned.distances(pool).diagonal()
    torch.testing.assert_close(own, torch.zeros(len(shifts)), atol=1e-6, rtol=0)


def test_alignment_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match=r"\[P, C, H, W\] with P > 0, got \(0, 4, 6, 6\)"):
        AlignedReferences(normal(0, 4, 6, 6))
    with pytest.raises(ValueError, match=r"a 5 x 5 grid needs .*maps of at least that size"):
        AlignedReferences(normal(3, 4, 4, 6))
    with pytest.raises(ValueError, match="cannot form 5 centres: at least 5 normal images are needed, got 1"):
        AlignedReferences(normal(1, 4, 5, 5))
    with pytest.raises(ValueError, match=r"K = 4 references .* pool of 3 images"):
        AlignedReferences(normal(3, 4, 10, 10), centres=2).choose(normal(1, 4, 10, 10), 4)
