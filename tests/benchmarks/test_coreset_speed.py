"""Coreset and neighbours against named baselines: ratios of CPU time on one thread, and peak memory.

Run by `make bench`. A pick of a baseline costs the same whatever was picked before, so a few dozen picks are timed and
scaled to k. Two data sets: "clustered" stands for patch features (40 clusters of unequal size and spread, each of rank
24, and noise), "isotropic" is Gaussian noise, where no row is near any other.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from clock import cpu_seconds, resident_kib
from torch import Tensor

from downstream.coreset import greedy_coreset
from downstream.neighbours import Neighbours

pytestmark = pytest.mark.benchmark

QUERIES, BANK = 4096, 20_000


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def draw(data: str, rows: int, width: int) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, width, generator=rng)
    if data == "isotropic":
        return noise
    clusters, rank = 40, 24
    which = torch.multinomial(torch.rand(clusters, generator=rng) + 0.05, rows, True, generator=rng)
    x = 0.1 * noise + torch.randn(clusters, width, generator=rng)[which]
    for cluster in range(clusters):
        own = (which == cluster).nonzero()[:, 0]
        basis = torch.randn(rank, width, generator=rng) / rank**0.5
        spread = 0.1 + 0.9 * torch.rand(1, generator=rng)
        x[own] += spread * torch.randn(len(own), rank, generator=rng) @ basis
    return x


def distance_per_pick(x: Tensor, picks: int) -> list[int]:
    """The common form: all differences and a square root at every pick."""
    nearest, chosen = torch.full((len(x),), torch.inf), [0]
    while len(chosen) < picks:
        nearest = torch.minimum(nearest, torch.norm(x - x[chosen[-1]], dim=1))
        chosen.append(int(nearest.argmax()))
    return chosen


def product_per_pick(x: Tensor, norms: Tensor, picks: int) -> list[int]:
    """The fast form: cached norms, one matrix-vector product a pick, no square root."""
    nearest, chosen = torch.full((len(x),), torch.inf), [0]
    while len(chosen) < picks:
        last = chosen[-1]
        nearest = torch.minimum(nearest, torch.addmv(norms + norms[last], x, x[last], alpha=-2))
        chosen.append(int(nearest.argmax()))
    return chosen


@pytest.mark.parametrize("data", ["clustered", "isotropic"])
@pytest.mark.parametrize(
    ("rows", "width", "k", "times_distance", "times_product"),
    [
        (20_000, 1024, 500, 20, 5),
        (20_000, 1024, 2000, 20, 5),
        # These features fit in a cache, where a product per pick is fast if nobody else uses it.
        (20_000, 128, 500, 10, 4),
        (20_000, 128, 2000, 10, 8),
        (100_000, 128, 1000, 10, 8),
        (50_000, 128, 5000, 10, 8),
    ],
)
def test_greedy_coreset(data: str, rows: int, width: int, k: int, times_distance: float, times_product: float) -> None:
    x, sample = draw(data, rows, width), 40
    norms = x.square().sum(1)
    assert greedy_coreset(x, sample).tolist() == distance_per_pick(x, sample) == product_per_pick(x, norms, sample)
    ours = cpu_seconds(lambda: greedy_coreset(x, k), 3)
    slow = cpu_seconds(lambda: distance_per_pick(x, sample), 2) * (k - 1) / (sample - 1)
    fast = cpu_seconds(lambda: product_per_pick(x, norms, sample), 3) * (k - 1) / (sample - 1)
    print(
        f"\ncoreset of {k} of {rows} {data} rows, D = {width}: {ours:.2f} s; a distance per pick {slow:.1f} s, "
        f"{slow / ours:.1f} x faster; cached norms and a product per pick {fast:.2f} s, {fast / ours:.1f} x faster"
    )
    assert slow / ours >= times_distance
    assert fast / ours >= times_product


def print_peak() -> None:
    """Peak memory of a choice, features included, as a multiple of the features."""
    x = draw("clustered", 20_000, 1024)
    greedy_coreset(x[:1000].clone(), 100)  # libraries are loaded before the measurement
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # peak := current
    before = resident_kib("VmRSS")
    greedy_coreset(x, 2000)
    print(1 + (resident_kib("VmHWM") - before) * 1024 / x.nbytes)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
def test_coreset_memory() -> None:
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    print(f"\ncoreset of 2000 of 20000 rows, D = 1024: peak memory {float(done.stdout):.2f} x the features")
    assert float(done.stdout) <= 2.2


@pytest.mark.parametrize("data", ["clustered", "isotropic"])
@pytest.mark.parametrize("k", [1, 9])
@pytest.mark.parametrize("width", [1024, 128])
def test_exact_neighbours(width: int, k: int, data: str) -> None:
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(1)
    x = draw(data, QUERIES + BANK, width)[torch.randperm(QUERIES + BANK, generator=torch.Generator().manual_seed(1))]
    query, bank = x[:QUERIES].clone(), x[QUERIES:].clone()
    index = faiss.IndexFlatL2(width)
    index.add(bank.numpy())
    ours, with_faiss = Neighbours(bank, "torch"), Neighbours(bank, "faiss")
    for mine, theirs in zip(ours.search(query, k), with_faiss.search(query, k), strict=True):
        assert torch.equal(mine, theirs)
    fast, checked = cpu_seconds(lambda: ours.search(query, k), 4), cpu_seconds(lambda: with_faiss.search(query, k), 2)
    slow = cpu_seconds(lambda: index.search(query.numpy(), k), 4)
    print(
        f"\n{k} nearest of {BANK} {data} rows, D = {width}, {QUERIES} queries: torch {fast:.2f} s, faiss {slow:.2f} s "
        f"(with exact distances {checked:.2f} s), speed {slow / fast:.2f} of faiss"
    )
    assert slow / fast >= 0.75


if __name__ == "__main__":
    print_peak()
