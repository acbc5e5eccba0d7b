"""PaDiM's Gaussians, the greedy coreset and AUPRO against anomalib's, on the same arrays: ratios of CPU time.

anomalib is no dependency: without it nothing here runs. With one in a folder of its own,
`PYTHONPATH=<folder> make bench` compares with it. The numbers of both are first checked to agree; what differs:

- anomalib inverts every covariance in float32, we factorise it in float64;
- its coreset starts at a random row, and picks in a random sparse projection of the features (of 244 channels for
  20000 rows); with one more axis it takes the features as they are, which is the form whose picks can be compared;
- its AUPRO adds up float32 numbers of every pixel.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clock import cpu_seconds
from test_coreset_speed import draw
from test_metrics_speed import IMAGES, SIDE, inputs
from torch import Tensor

from downstream.coreset import greedy_coreset
from downstream.gaussians import Gaussians, Moments
from downstream.metrics import aupro

pytest.importorskip("anomalib")

pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.filterwarnings("ignore"),  # anomalib's and its dependencies', about themselves
]

EPS = 0.01 + 1e-5  # what anomalib adds to the diagonal
BATCH = 20


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def embeddings(images: int, positions: int, width: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(images, positions, width, generator=rng) * torch.linspace(0.1, 2, width)


def fitted(batches: tuple[Tensor, ...]) -> Gaussians:
    moments = Moments(sum(map(len, batches)))
    for batch in batches:
        moments.add(batch)
    return moments.gaussians(EPS)


def square(rows_BPD: Tensor) -> Tensor:
    """[B, P, D] -> [B, D, 1, P], the grid that anomalib takes."""
    return rows_BPD.transpose(1, 2)[:, :, None].contiguous()


@pytest.mark.parametrize(
    ("images", "positions", "width", "fit", "predict"), [(200, 784, 100, 1.5, 0.5), (200, 64, 550, 2.0, 1.0)]
)
def test_padim(images: int, positions: int, width: int, fit: float, predict: float) -> None:
    """The default channels of ResNet-18 and of WideResNet-50, on parts of their grid of 56 x 56."""
    from anomalib.models.components import MultiVariateGaussian
    from anomalib.models.image.padim.anomaly_map import AnomalyMapGenerator

    rows, queries = embeddings(images, positions, width), embeddings(16, positions, width, seed=1)
    batches, grid, asked = rows.split(BATCH), square(rows), square(queries)
    gaussians, statistics = fitted(batches), MultiVariateGaussian().fit(grid)

    def theirs() -> Tensor:
        return AnomalyMapGenerator.compute_distance(asked, statistics)

    torch.testing.assert_close(gaussians.distances(queries), theirs().flatten(1), rtol=1e-3, atol=1e-3)
    fast = cpu_seconds(lambda: fitted(batches), 3)
    slow = cpu_seconds(lambda: MultiVariateGaussian().fit(grid), 3)
    quick, late = cpu_seconds(lambda: gaussians.distances(queries), 7), cpu_seconds(theirs, 7)
    print(
        f"\nPaDiM, {images} images, {positions} positions, D = {width}: fit {fast:.2f} s, anomalib {slow:.2f} s, "
        f"{slow / fast:.1f} x faster; 16 images scored in {quick * 1e3:.0f} ms, anomalib {late * 1e3:.0f} ms, "
        f"{late / quick:.1f} x faster"
    )
    assert slow / fast >= fit
    assert late / quick >= predict


def covering_radius(x: Tensor, chosen: Tensor) -> float:
    return float(torch.cdist(x, x[chosen]).amin(1).max())


@pytest.mark.parametrize("data", ["clustered", "isotropic"])
def test_coreset(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from anomalib.models.components import KCenterGreedy
    from anomalib.models.components.sampling import k_center_greedy

    monkeypatch.setattr(k_center_greedy, "tqdm", lambda rows, **_: rows)
    rows, width, share = 20_000, 1024, 0.025
    k = int(rows * share)
    x = draw(data, rows, width)

    def theirs(features: Tensor) -> Tensor:
        torch.manual_seed(0)
        return torch.tensor(KCenterGreedy(features, share).select_coreset_idxs())

    picks: list[Tensor] = []
    slow = cpu_seconds(lambda: picks.append(theirs(x[..., None])), 1)
    reduced = cpu_seconds(lambda: picks.append(theirs(x)), 1)
    same, projected = picks
    assert torch.equal(greedy_coreset(x, k, start=int(same[0])), same)
    radii = covering_radius(x, projected) / covering_radius(x, same)
    fast = cpu_seconds(lambda: greedy_coreset(x, k), 3)
    print(
        f"\ncoreset of {k} of {rows} {data} rows, D = {width}: {fast:.2f} s; anomalib on the same features "
        f"{slow:.1f} s, {slow / fast:.1f} x faster; in its projection {reduced:.1f} s, {reduced / fast:.1f} x faster, "
        f"and its rows leave a radius {radii:.2f} times as large"
    )
    assert slow / fast >= 10
    assert reduced / fast >= 2
    assert radii >= 0.98


def test_aupro() -> None:
    from anomalib.metrics import AUPRO

    maps, masks = inputs()
    found, truth = torch.from_numpy(maps), torch.from_numpy(masks.astype(np.int64))

    def theirs() -> float:
        metric = AUPRO(fields=["maps", "masks"], fpr_limit=0.3)
        metric.update(SimpleNamespace(maps=found, masks=truth))
        return float(metric.compute())

    assert aupro(maps, masks) == pytest.approx(theirs(), abs=1e-3)
    fast, slow = cpu_seconds(lambda: aupro(maps, masks), 5), cpu_seconds(theirs, 3)
    print(f"\nAUPRO, {IMAGES} maps of {SIDE} x {SIDE}: {fast:.2f} s, anomalib {slow:.2f} s, {slow / fast:.1f} x faster")
    assert slow / fast >= 1
