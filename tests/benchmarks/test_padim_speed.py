"""PaDiM's Gaussians against the public form: np.cov of every position in a loop over all stored embeddings, and an
inverse of every position when predicting. CPU time of one thread, the best of several repeats.

Run by `make bench`. The baselines are first checked to give the same numbers.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from clock import cpu_seconds, resident_kib
from numpy.typing import NDArray
from torch import Tensor

from downstream.gaussians import Gaussians, Moments

pytestmark = pytest.mark.benchmark

POSITIONS, WIDTH, EPS = 64, 550, 0.01  # 550 channels of WideResNet-50 are the paper's; the grid is a part of 56 x 56
BATCH = 20


def embeddings(images: int, positions: int = POSITIONS, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(images, positions, WIDTH, generator=rng) * torch.linspace(0.1, 2, WIDTH)


def ours(batches: tuple[Tensor, ...]) -> Gaussians:
    moments = Moments(sum(map(len, batches)))
    for batch in batches:
        moments.add(batch)
    return moments.gaussians(EPS)


def public(batches: tuple[Tensor, ...]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Mean [D, P] and covariance [D, D, P]."""
    stored = torch.cat([batch.transpose(1, 2) for batch in batches]).numpy()  # [n, D, P]
    covariance = np.zeros((stored.shape[1], stored.shape[1], stored.shape[2]))
    identity = np.identity(stored.shape[1])
    for position in range(stored.shape[2]):
        covariance[:, :, position] = np.cov(stored[:, :, position], rowvar=False) + EPS * identity
    return stored.mean(0), covariance


def public_distances(mean: Tensor, covariance: Tensor, queries: Tensor, inverse: Tensor | None = None) -> Tensor:
    """Inverse of every position, then einsum: mean [P, D], covariance [P, D, D], queries [B, P, D] -> [B, P]."""
    if inverse is None:
        inverse = torch.stack([torch.from_numpy(np.linalg.inv(one.numpy())) for one in covariance]).float()
    delta = queries - mean
    return torch.einsum("bpd,pde,bpe->bp", delta, inverse, delta).sqrt()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(("images", "faster"), [(200, 3.0), (700, 0.8)])
def test_fit_time(images: int, faster: float) -> None:
    """The target is for fewer images than channels, as in nearly all benchmark categories; else no slower, nearly."""
    batches = embeddings(images).split(BATCH)
    fast, slow = cpu_seconds(lambda: ours(batches), 3), cpu_seconds(lambda: public(batches), 2)
    print(
        f"\nPaDiM fit, {images} images, {POSITIONS} positions, D = {WIDTH}: {fast:.2f} s, factors included; np.cov in "
        f"a loop {slow:.2f} s, {slow / fast:.1f} x faster"
    )
    assert slow / fast >= faster


@pytest.mark.parametrize(("images", "faster"), [(200, 5.0), (700, 5.0)])
@pytest.mark.parametrize("batch", [1, 16])
def test_prediction_time(images: int, batch: int, faster: float) -> None:
    batches, queries = embeddings(images, 16).split(BATCH), embeddings(batch, 16, seed=1)
    gaussians, (mean_DP, covariance_DDP) = ours(batches), public(batches)
    mean, covariance = torch.from_numpy(mean_DP.T), torch.from_numpy(covariance_DDP).permute(2, 0, 1).contiguous()
    torch.testing.assert_close(
        gaussians.distances(queries), public_distances(mean, covariance, queries), rtol=1e-3, atol=1e-3
    )
    inverse = torch.linalg.inv(covariance[0]).float().expand(16, -1, -1).contiguous()
    fast = cpu_seconds(lambda: gaussians.distances(queries), 7)
    slow = cpu_seconds(lambda: public_distances(mean, covariance, queries), 1)
    kept = cpu_seconds(lambda: public_distances(mean, covariance, queries, inverse), 7)
    print(
        f"\nPaDiM prediction of {batch}, {images} images fitted, 16 positions, D = {WIDTH}: {fast * 1e3:.2f} ms; "
        f"inverse and einsum {slow * 1e3:.0f} ms, {slow / fast:.0f} x faster; inverse kept, {kept / fast:.1f} x faster"
    )
    assert slow / fast >= faster


def print_peak(name: str, images: int) -> None:
    """Print by how much a fit raises the peak of this process's resident memory (KiB); batches are made as it goes."""

    def batches() -> tuple[Tensor, ...]:
        return tuple(embeddings(BATCH, seed=seed) for seed in range(images // BATCH))

    torch.set_num_threads(1)
    ours(tuple(embeddings(4, 2).split(2))), public(tuple(embeddings(4, 2).split(2)))  # libraries are loaded
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # peak := current
    before = resident_kib("VmRSS")
    if name == "ours":
        moments = Moments(images)
        for seed in range(images // BATCH):
            moments.add(embeddings(BATCH, seed=seed))
        result: object = moments.gaussians(EPS)
    else:
        result = public(batches())
    assert result is not None
    print(resident_kib("VmHWM") - before)


def peak_kib(name: str, images: int) -> int:
    done = subprocess.run([sys.executable, __file__, name, str(images)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(("images", "share"), [(200, 0.4), (700, 0.4)])
def test_fit_memory(images: int, share: float) -> None:
    fit, loop = peak_kib("ours", images), peak_kib("public", images)
    print(
        f"\nPaDiM fit, {images} images, {POSITIONS} positions, D = {WIDTH}: peak {fit / 1024:.0f} MiB, np.cov over "
        f"stored embeddings {loop / 1024:.0f} MiB, {fit / loop:.2f} of it"
    )
    assert fit / loop <= share


if __name__ == "__main__":
    print_peak(sys.argv[1], int(sys.argv[2]))
