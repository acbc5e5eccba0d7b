"""The coreset's picks against the plain loop; the bounds and the row sums its exactness rests on."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adpretrain.device import full_precision
from downstream import coreset
from downstream.coreset import greedy_coreset, project, subsample
from downstream.distances import LOWER, UPPER, rounding, squared_distances


def plain_loop(features: Tensor, k: int, start: int = 0) -> list[int]:
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    nearest = torch.full((len(features),), torch.inf, dtype=features.dtype)
    chosen = [start]
    while len(chosen) < k:
        nearest = torch.minimum(nearest, (features - features[chosen[-1]]).square().sum(1))
        nearest[chosen[-1]] = -torch.inf
        chosen.append(int(nearest.argmax()))
    return chosen


def draw(kind: str, rows: int, width: int, rng: torch.Generator) -> Tensor:
    x = torch.randn(rows, width, generator=rng, dtype=torch.float64)
    origin = torch.randint(max(1, rows // 8), (rows,), generator=rng)
    return {
        "isotropic": x,
        "integers": (2 * x).round(),  # many exact ties
        "binary": (x > 0).double(),
        "repeated": x[origin],
        "tight clusters": x[origin] + 1e-4 * x,
        "common mean": x + 1e4 * torch.randn(width, generator=rng, dtype=torch.float64),
        "sphere": x / x.norm(dim=1, keepdim=True),
        "nearly equal distances": torch.eye(rows, width, dtype=torch.float64) + 1e-7 * x,
        "outlier": torch.cat([x[1:], 1e3 * x[:1]]),
        "plane": x[:, :2] @ torch.randn(min(2, width), width, generator=rng, dtype=torch.float64),
        "identical": x[:1].expand(rows, -1).clone(),
    }[kind]


KINDS = [
    "isotropic",
    "integers",
    "binary",
    "repeated",
    "tight clusters",
    "common mean",
    "sphere",
    "nearly equal distances",
    "outlier",
    "plane",
    "identical",
]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a few dozen rows take every branch."""
    for name, size in (("REFRESHED", 8), ("SETTLED", 3), ("CHUNK", 5)):
        monkeypatch.setattr(coreset, name, size)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *itertools.product(KINDS, [torch.float32, torch.float64]),
        *itertools.product(["isotropic", "integers"], [torch.float16, torch.bfloat16]),
    ],
    ids=str,
)
def test_same_picks_as_the_plain_loop(kind: str, dtype: torch.dtype, small_blocks: None) -> None:
    rng = torch.Generator().manual_seed(0)
    for rows, width in itertools.product([1, 2, 9, 50], [1, 3, 33]):
        x = draw(kind, rows, width, rng).to(dtype)
        for k in {1, (rows + 1) // 2, rows}:
            assert greedy_coreset(x, k, start=rows // 3).tolist() == plain_loop(x, k, rows // 3)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_same_picks_on_small_integers(data: st.DataObject) -> None:
    """Integers are exact in every form of the distance, so that any other order is a mistake about ties."""
    rows, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 4))
    values = data.draw(st.lists(st.integers(-2, 2), min_size=rows * width, max_size=rows * width))
    x = torch.tensor(values, dtype=torch.float32).view(rows, width)
    k, start = data.draw(st.integers(1, rows)), data.draw(st.integers(0, rows - 1))
    assert greedy_coreset(x, k, start).tolist() == plain_loop(x, k, start)


@pytest.mark.parametrize("kind", KINDS)
def test_same_picks_at_the_real_block_sizes(kind: str) -> None:
    x = draw(kind, 6000, 48, torch.Generator().manual_seed(1)).float()
    assert greedy_coreset(x, 150, start=5).tolist() == plain_loop(x, 150, 5)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e15])
def test_same_picks_where_squares_underflow_or_nearly_overflow(scale: float, small_blocks: None) -> None:
    x = scale * draw("isotropic", 60, 7, torch.Generator().manual_seed(2)).float()
    assert greedy_coreset(x, 40).tolist() == plain_loop(x, 40)


def test_same_picks_with_two_threads_and_strided_features() -> None:
    x = draw("tight clusters", 3000, 80, torch.Generator().manual_seed(3)).float()
    expected, threads = plain_loop(x, 100), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert greedy_coreset(x.T.contiguous().T, 100).tolist() == expected
        assert greedy_coreset(x.clone().requires_grad_(), 100).tolist() == expected
    finally:
        torch.set_num_threads(threads)


def test_rows_equal_to_chosen_ones_follow_in_order() -> None:
    x = torch.tensor([[0.0], [3.0], [0.0], [3.0], [1.0]])
    assert greedy_coreset(x, 5, start=2).tolist() == [2, 1, 4, 0, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_row_has_the_same_sum_in_any_company(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    for width in [*range(1, 36), 127, 128, 384, 1000, 1024, 40_000]:
        x = torch.randn(70 if width < 2000 else 5, width, generator=rng, dtype=dtype)
        expected = (x - x[3]).square().sum(1)
        for rows in ([4], [0, 1, 2], list(range(len(x)))):
            i = torch.tensor(rows)
            assert torch.equal(squared_distances(x, i, x, torch.full_like(i, 3)), expected[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_hold(kind: str, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(4)
    for width in (1, 5, 64, 768):
        x = draw(kind, 40, width, rng).to(dtype)
        shifted, bounds = x - x.mean(0), rounding(width, dtype)
        norms = shifted.square().sum(1)
        exact = (x[:, None] - x).square().sum(2)
        lower, upper = (
            bounds.bounds(shifted, shifted, bias, side) + bias[:, None]
            for side in (LOWER, UPPER)
            for bias in (bounds.biases(norms, side),)
        )
        assert (lower <= exact).all()
        assert (exact <= upper).all()
        widths = bounds.widths(norms)
        assert (exact <= lower + (widths[:, None] + widths)).all()
        assert (lower + (widths[:, None] + widths) <= upper + 2 * (upper - lower)).all()
        # A bound nobody could use would be a mistake as well: 4 (3 D + 24) rounding units of the norms.
        widest = 6 * (3 * width + 24) * torch.finfo(dtype).eps * (norms[:, None] + norms) + 1e-30
        assert (upper - lower <= widest).all()


def test_products_are_in_full_precision_and_the_settings_come_back() -> None:
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with full_precision(torch.device("cpu")), torch.autocast("cuda", enabled=False):
            assert not matmul.allow_tf32 if not hasattr(matmul, "fp32_precision") else matmul.fp32_precision == "ieee"
            assert not torch.is_autocast_enabled("cpu")
            assert not torch.is_grad_enabled()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    x = draw("isotropic", 500, 32, torch.Generator().manual_seed(5)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert greedy_coreset(x, 50).tolist() == plain_loop(x, 50)


def test_two_threads_can_be_in_full_precision() -> None:
    """The setting is the process's: the thread that leaves first must not end it for the other, nor keep it."""

    def setting() -> str:
        matmul = getattr(torch.backends.mkldnn, "matmul", None)
        return matmul.fp32_precision if hasattr(matmul, "fp32_precision") else torch.get_float32_matmul_precision()

    before, cpu = setting(), torch.device("cpu")
    first, second = full_precision(cpu), full_precision(cpu)
    with ThreadPoolExecutor(1) as other:
        first.__enter__()
        inside = setting()
        other.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        assert setting() == inside
        other.submit(second.__exit__, None, None, None).result()
    assert setting() == before


def test_progress_is_told_up_to_the_end() -> None:
    told: list[tuple[str, int, int]] = []
    greedy_coreset(
        torch.randn(5000, 8, generator=torch.Generator().manual_seed(6)), 300, progress=lambda *a: told.append(a)
    )
    done = [entry[1] for entry in told]
    assert len(done) > 3
    assert done == sorted(done)
    assert told[-1] == ("choosing a coreset", 300, 300)


def test_projection_keeps_distances_and_is_seeded() -> None:
    x = torch.randn(200, 512, generator=torch.Generator().manual_seed(7))
    small = project(x, 128, seed=3)
    ratio = torch.pdist(small).square() / torch.pdist(x).square()
    # chi-squared with 128 degrees of freedom / 128: mean 1, standard deviation 0.125
    assert ratio.mean().item() == pytest.approx(1, abs=0.02)
    assert ratio.std().item() == pytest.approx(0.125, abs=0.02)
    assert torch.equal(small, project(x, 128, seed=3))
    assert not torch.equal(small, project(x, 128, seed=4))
    assert greedy_coreset(x, 20, projection_dim=128, seed=3).tolist() == plain_loop(small, 20)


def test_a_coreset_covers_better_than_random_rows() -> None:
    """What the choice is for (PatchCore Fig. 3): the largest distance of a row to the nearest row kept."""
    x = draw("isotropic", 4000, 6, torch.Generator().manual_seed(8)).float()
    x[:2000] = 0.05 * x[:2000] + 9  # a dense cluster takes half of a random choice
    radius = {way: torch.cdist(x, x[subsample(x, 0.02, way)]).amin(1).max() for way in ("greedy", "random")}
    assert radius["greedy"] < 0.7 * radius["random"]


def test_subsample() -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(9))
    assert subsample(x, 0.1).tolist() == subsample(x, 3).tolist() == plain_loop(x, 3)
    assert subsample(x, 7, start=4, projection_dim=2, seed=5).tolist() == plain_loop(project(x, 2, 5), 7, 4)
    assert subsample(x, 0.0001).tolist() == [0]
    assert subsample(x, 0.5, "none").tolist() == list(range(30))
    random = subsample(x, 0.5, "random", seed=1)
    assert random.tolist() == sorted(set(random.tolist()))
    assert len(random) == 15
    assert random.tolist() == subsample(x, 0.5, "random", seed=1).tolist() != subsample(x, 0.5, "random").tolist()
    for result in (random, subsample(x, 3), subsample(x, 1.0)):
        assert result.dtype == torch.int64


@pytest.mark.parametrize(
    ("x", "arguments", "words"),
    [
        (torch.zeros(4, 2), {"k": 5}, "a coreset of 5 rows from 4; choose 1 to 4"),
        (torch.zeros(4, 2), {"k": 0}, "choose 1 to 4"),
        (torch.zeros(4, 2), {"k": 1, "start": 4}, "start 4 is not the index of a row; choose 0 to 3"),
        (torch.zeros(4, 2), {"k": 1, "start": -1}, "start -1"),
        (torch.zeros(4, 2), {"k": 1, "projection_dim": 3}, "projection_dim 3; choose 1 to 2"),
        (torch.zeros(2, 4, 2), {"k": 1}, r"\(2, 4, 2\); expected \[N, D\]"),
        (torch.zeros(0, 2), {"k": 1}, r"\(0, 2\)"),
        (torch.zeros(4, 2, dtype=torch.int64), {"k": 1}, "torch.int64"),
        (torch.tensor([[1.0], [torch.nan]]), {"k": 1}, "NaN or an infinity, the first in row 1"),
        (torch.tensor([[1.0], [2.0], [-torch.inf]]), {"k": 1}, "row 2"),
        (torch.tensor([[1e20], [-1e20]]), {"k": 1}, "overflow torch.float32"),
    ],
)
def test_mistakes_are_named(x: Tensor, arguments: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        greedy_coreset(x, **arguments)


@pytest.mark.parametrize(
    ("amount", "method", "words"),
    [
        (0.1, "kmeans", "'kmeans'; choose one of greedy, random, none"),
        (0.0, "greedy", "expected a share"),
        (1.5, "random", "expected a share"),
        (True, "greedy", "expected a share"),
        (9, "random", "9 rows of 4"),
    ],
)
def test_subsampling_mistakes_are_named(amount: float, method: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        subsample(torch.zeros(4, 2), amount, method)
