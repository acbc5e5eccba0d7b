"""Exact neighbours with both backends against a plain search; the approximate ones by their recall."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from downstream import neighbours
from downstream.neighbours import ApproximateNeighbours, Neighbours, nearest

BACKENDS = ["torch", "faiss"]


def plain_search(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All distances, and a stable sort: the lowest index first among equals."""
    dtype = torch.promote_types(bank.dtype, torch.float32)
    query, bank = query.to(dtype), bank.to(dtype)
    distance, index = torch.stack([(q - bank).square().sum(1) for q in query]).sort(dim=1, stable=True)
    return distance[:, :k].sqrt(), index[:, :k]


def draw(kind: str, rows: int, width: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=rng)
    return {
        "isotropic": x,
        "integers": (2 * x).round(),
        "repeated": x[torch.randint(max(1, rows // 30), (rows,), generator=rng)],
        "tight clusters": x[torch.randint(max(1, rows // 30), (rows,), generator=rng)] + 1e-4 * x,
        "common mean": x + 1e3,
        "outlier": torch.cat([x[1:], 1e3 * x[:1]]),
        "identical": x[:1].expand(rows, -1).clone(),
    }[kind]


KINDS = ["isotropic", "integers", "repeated", "tight clusters", "common mean", "outlier", "identical"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_neighbours_as_the_plain_search(kind: str, backend: str) -> None:
    for rows, width in ((1, 3), (7, 1), (40, 5), (700, 33)):
        x = draw(kind, rows + 60, width)
        query, bank = torch.cat([x[rows:], x[:9]]), x[:rows]
        search = Neighbours(bank, backend)
        for k in {1, min(rows, 9), rows // 2 + 1, rows}:
            distance, index = search.search(query, k)
            expected_distance, expected_index = plain_search(query, bank, k)
            assert torch.equal(index, expected_index)
            assert torch.equal(distance, expected_distance)


@pytest.mark.parametrize("chunk_bytes", [1, 200_000])
@pytest.mark.parametrize("kind", KINDS)
def test_same_neighbours_in_small_chunks(kind: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(neighbours.QUERIES, "torch", 50)
    monkeypatch.setattr(neighbours, "UNPROVEN", 30)
    x = draw(kind, 530, 16)
    for k in (1, 9, 100):
        distance, index = nearest(x[400:], x[:400], k, "torch", chunk_bytes)
        expected_distance, expected_index = plain_search(x[400:], x[:400], k)
        assert torch.equal(index, expected_index)
        assert torch.equal(distance, expected_distance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    x = draw("integers", 340, 12).to(dtype)
    for backend in ["auto", "torch"] + ["faiss"] * (dtype != torch.float64):
        distance, index = nearest(x[:40], x[40:], 5, backend)
        expected_distance, expected_index = plain_search(x[:40], x[40:], 5)
        assert distance.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(index, expected_index)
        assert torch.equal(distance, expected_distance)


def test_both_backends_agree_to_the_last_bit_on_wide_features() -> None:
    x = draw("tight clusters", 9000, 384) + draw("isotropic", 9000, 384, 1) / 30
    found = [nearest(x[8000:], x[:8000], 9, backend) for backend in BACKENDS]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    distance, index = plain_search(x[8000:8050], x[:8000], 9)
    assert torch.equal(found[0][0][:50], distance)
    assert torch.equal(found[0][1][:50], index)


def test_the_budget_bounds_the_block_of_distances() -> None:
    search = Neighbours(draw("isotropic", 5000, 4), "torch", chunk_bytes=1 << 20)
    for queries in (1, 100, 512):
        assert search._buffer(queries).nbytes <= 1 << 20


def test_no_queries() -> None:
    distance, index = nearest(torch.zeros(0, 3), torch.zeros(4, 3), 2)
    assert distance.shape == index.shape == (0, 2)


WITHOUT_FAISS = """
import sys
import torch
from downstream.neighbours import ApproximateNeighbours, Neighbours
assert "faiss" not in sys.modules  # imported only when it is needed
sys.modules["faiss"] = None  # what an environment without it looks like to import
bank = torch.randn(300, 8)
assert Neighbours(bank).backend == "torch"
for make in (lambda: Neighbours(bank, "faiss"), lambda: ApproximateNeighbours(bank)):
    try:
        make()
    except ValueError as error:
        print(error)
"""


def test_without_faiss_torch_searches_and_the_extra_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_FAISS], capture_output=True, text=True, check=True)
    assert done.stdout.count("pip install 'adpretrain[faiss-cpu]'") == 2


@pytest.mark.parametrize(
    ("query", "bank", "arguments", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 3), {"k": 5}, "5 neighbours from a bank of 4 rows; choose 1 to 4"),
        (torch.zeros(2, 3), torch.zeros(4, 3), {"k": 0}, "choose 1 to 4"),
        (torch.zeros(2, 2), torch.zeros(4, 3), {}, r"\(2, 2\) do not fit the bank; expected \[Q, 3\]"),
        (torch.zeros(2, 3), torch.zeros(0, 3), {}, r"bank of shape \(0, 3\)"),
        (torch.full((2, 3), torch.nan), torch.zeros(4, 3), {}, "queries hold a NaN or an infinity, the first in row 0"),
        (torch.zeros(2, 3), torch.full((4, 3), torch.inf), {}, "bank hold"),
        (torch.zeros(2, 3), torch.zeros(4, 3), {"backend": "annoy"}, "choose one of auto, torch, faiss"),
        (torch.zeros(2, 3), torch.zeros(4, 3).double(), {"backend": "faiss"}, "float64 on cpu; choose backend 'torch'"),
        (torch.full((2, 3), 1e20), torch.zeros(4, 3), {}, "queries are so large"),
        (torch.zeros(2, 3), torch.tensor([[1e20] * 3, [0.0] * 3]), {}, "bank is so large"),
    ],
)
def test_mistakes_are_named(query: Tensor, bank: Tensor, arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        nearest(query, bank, **arguments)


def test_approximate_neighbours_are_mostly_the_nearest() -> None:
    x = draw("tight clusters", 3200, 32) + draw("isotropic", 3200, 32, 1) / 5
    query, bank = x[3000:], x[:3000]
    distance, index = nearest(query, bank, 5)
    recall = []
    for nprobe, refine in ((1, 1), (50, 8)):
        approximate = ApproximateNeighbours(bank, nprobe, refine)
        near, found = approximate.search(query, 5)
        known = found >= 0
        true = (query[:, None] - bank[found.clamp_min(0)]).square().sum(2).sqrt()
        torch.testing.assert_close(near[known], true[known], rtol=1e-6, atol=0)  # distances of the rows themselves
        assert near[~known].isinf().all()
        assert (near >= distance * (1 - 1e-6)).all()
        recall.append((found[..., None] == index[:, None]).any(1).float().mean().item())
        again = ApproximateNeighbours(bank, nprobe, refine).search(query, 5)
        assert torch.equal(again[1], found)
    assert recall[0] < recall[1]
    assert recall[1] > 0.95


def test_approximate_defaults_fit_the_bank() -> None:
    for rows, width in ((256, 7), (1000, 48)):
        bank = draw("isotropic", rows, width)
        index = ApproximateNeighbours(bank).index
        assert 1 <= index.nprobe <= index.nlist <= rows // 39
        assert width % index.pq.M == 0


def test_too_small_a_bank_is_named() -> None:
    with pytest.raises(ValueError, match="needs at least 256 rows for its codes, the bank has 200; use Neighbours"):
        ApproximateNeighbours(draw("isotropic", 200, 12))
