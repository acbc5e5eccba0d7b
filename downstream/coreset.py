"""A few rows that stand for all: PatchCore's greedy k-centre coreset (PatchCore Alg. 1), exact and by blocks.

The plain loop meets all N rows for every pick. Here a row's distance to the chosen rows is an upper bound that is
brought up to date only when the row could be picked next: distances can only fall, so a row whose exact distance is
beyond all bounds is the farthest of all. Rows are brought up to date in blocks, by one matrix product with the rows
chosen since. Products are rounded; every pair that decides is computed again (`downstream.distances`), hence the picks
are those of the plain loop.

Shapes: N rows of D channels, K of them in a block, P chosen rows, T candidates for the next picks, k rows to choose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from downstream.distances import (
    LOWER,
    UPPER,
    check_rows,
    compute_type,
    full_precision,
    rounding,
    rows_per_block,
    squared_distances,
    sums_of_squares,
)

METHODS = ("greedy", "random", "none")
REFRESHED = 2048  # rows brought up to date at once, at least
SETTLED = 256  # rows made exact at once, at least; as many, at most, among which picks are made without the others
CHUNK = 2048  # the largest matrix product is CHUNK x CHUNK
CHOSEN = -1.0

Progress = Callable[[str, int, int], None]


def subsample(
    features_ND: Tensor,
    amount: float,
    method: str = "greedy",
    start: int = 0,
    projection_dim: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Indices of the rows to keep: [k] int64, on the features' device.

    ``amount``: a share of the rows, if it is a float in (0, 1] (PatchCore-1% is 0.01; at least one row is kept), or
    their number, if it is an int. ``method``: "greedy" (`greedy_coreset`, in the order of choice), "random" (uniform,
    without replacement, from ``seed``; ascending) or "none" (every row, whatever the amount).

    Raises ValueError for another method or an amount that is neither.
    """
    if method not in METHODS:
        raise ValueError(f"subsampling method {method!r}; choose one of {', '.join(METHODS)}")
    check_rows(features_ND, "features")
    rows = features_ND.shape[0]
    if method == "none":
        return torch.arange(rows, device=features_ND.device)
    k = _count(amount, rows)
    if method == "random":
        drawn = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:k]
        return drawn.sort().values.to(features_ND.device)
    return greedy_coreset(features_ND, k, start, projection_dim, seed, progress)


def _count(amount: float, rows: int) -> int:
    if isinstance(amount, int) and not isinstance(amount, bool):
        if not 1 <= amount <= rows:
            raise ValueError(f"{amount} rows of {rows}; choose 1 to {rows}, or a share such as 0.1")
        return amount
    if isinstance(amount, bool) or not 0 < amount <= 1:
        raise ValueError(f"amount {amount!r}; expected a share in (0, 1] as a float or a number of rows as an int")
    return max(1, round(amount * rows))


def greedy_coreset(
    features_ND: Tensor,
    k: int,
    start: int = 0,
    projection_dim: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """The greedy k-centre choice (PatchCore Alg. 1): row ``start``, then always the row farthest from those chosen.

    Returns k distinct indices in the order of choice: [k] int64. They are exactly those of the plain loop

        nearest = full([N], inf)
        repeat: nearest = minimum(nearest, (features - features[last]).square().sum(1))
                nearest[chosen] = -1;  last = nearest.argmax()

    with distances in the features' type (half precision: float32), ties going to the lowest index; when every
    remaining row equals a chosen one, the remaining indices follow in ascending order. Exact means that torch's sum
    of a row does not depend on the number of rows: true on a CPU; on an accelerator, rows whose distances agree but
    for the last bits may come in another order.

    ``projection_dim``: choose by distances after a Gaussian random projection to so many channels, drawn from
    ``seed`` (Johnson-Lindenstrauss; PatchCore Sec. 3.2): faster, no longer the plain loop's choice in D channels.
    ``progress(what, done, total)`` is told how many rows are chosen. Memory beyond the features: about 30 N bytes,
    some tens of MiB, and the projected features.

    Raises ValueError if the features are no finite [N, D] matrix, or k, start or projection_dim are out of range.
    """
    check_rows(features_ND, "features")
    rows = features_ND.shape[0]
    if not 1 <= k <= rows:
        raise ValueError(f"a coreset of {k} rows from {rows}; choose 1 to {rows}")
    if not 0 <= start < rows:
        raise ValueError(f"start {start} is no row; choose 0 to {rows - 1}")
    with full_precision(features_ND.device):
        features_ND = features_ND.detach().contiguous()
        if projection_dim is not None:
            features_ND = project(features_ND, projection_dim, seed)
        search = _Search(features_ND, k, start)
        while search.count < k:
            if progress is not None:
                progress("choosing a coreset", search.count, k)
            search.choose_more()
        if progress is not None:
            progress("choosing a coreset", k, k)
        return search.chosen


def project(features_ND: Tensor, dim: int, seed: int = 0) -> Tensor:
    """Gaussian random projection that keeps squared distances in expectation: [N, dim]. The matrix depends on the seed,
    D and dim only. Raises ValueError if ``dim`` is not in 1..D."""
    width = features_ND.shape[1]
    if not 1 <= dim <= width:
        raise ValueError(
            f"projection_dim {dim}; choose 1 to {width} (the features' channels), or None for no projection"
        )
    dtype = compute_type(features_ND)
    matrix = torch.randn(width, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / dim**0.5
    matrix = matrix.to(dtype=dtype, device=features_ND.device)
    return torch.cat([block.to(dtype) @ matrix for block in features_ND.split(16 * CHUNK)])


class _Search:
    """The state of a greedy choice.

    ``distance_N`` (of a row to the chosen ones) is an upper bound of what `squared_distances` gives. It takes the first
    ``bounded_N`` chosen rows into account, and the first ``exact_N`` of them exactly. Chosen rows have -1.
    """

    def __init__(self, features_ND: Tensor, k: int, start: int) -> None:
        rows, width = features_ND.shape
        device = features_ND.device
        self.features_ND = features_ND
        self.dtype = compute_type(features_ND)
        self.rounding = rounding(width, self.dtype)
        self.chosen = torch.empty(k, dtype=torch.int64, device=device)
        self.chosen[0] = start
        self.count = 1
        self.block = REFRESHED
        self.bounded_N = torch.ones(rows, dtype=torch.int64, device=device)
        self.exact_N = torch.ones_like(self.bounded_N)
        self.distance_N = torch.empty(rows, dtype=self.dtype, device=device)
        norm_N = torch.empty_like(self.distance_N)
        # Near the mean the norms are small, and with them the rounding. A sample's mean does as well.
        self.centre_D = features_ND[:: max(1, rows // CHUNK)].mean(0, dtype=self.dtype)
        first, step = features_ND[start].to(self.dtype), rows_per_block(width)
        for i in range(0, rows, step):
            block = features_ND[i : i + step].to(self.dtype)
            for vector, out_N in ((first, self.distance_N), (self.centre_D, norm_N)):
                out_N[i : i + step] = sums_of_squares(block - vector)
        self.distance_N[start] = CHOSEN
        if not bool(norm_N.amax() * 8 < torch.finfo(self.dtype).max):
            raise ValueError(f"features are so large that their squared distances overflow {self.dtype}; scale them")
        self.biases_N = {side: self.rounding.biases(norm_N, side) for side in (LOWER, UPPER)}

    def bounds(self, rows_K: Tensor, others_P: Tensor, side: int) -> Tensor:
        """Lower or upper bounds of the distances of all pairs: [K, P]."""
        left, right = (self.features_ND.index_select(0, i).to(self.dtype) - self.centre_D for i in (rows_K, others_P))
        biases_N = self.biases_N[side]
        return self.rounding.bounds(left, right, biases_N[others_P], side).add_(biases_N[rows_K][:, None])

    def behind(self, rows_K: Tensor, known_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of those rows that do not know all chosen rows, each with a block of chosen rows to meet."""
        known_K = known_N[rows_K]
        late = (known_K < self.count) & (self.distance_N[rows_K] > 0)  # a row at distance 0 cannot come closer
        known_K, order = known_K[late].sort()
        rows_K = rows_K[late][order]
        for first in range(0, len(rows_K), CHUNK):
            for others in self.chosen[int(known_K[first]) : self.count].split(CHUNK):
                yield rows_K[first : first + CHUNK], others

    def bound(self, rows_K: Tensor) -> None:
        """Lower the distances of these rows to bounds that know all chosen rows."""
        for rows, others in self.behind(rows_K, self.bounded_N):
            upper_K = self.bounds(rows, others, UPPER).amin(1)
            self.distance_N[rows] = torch.minimum(self.distance_N[rows], upper_K)
        self.bounded_N[rows_K] = self.count

    def settle(self, rows_K: Tensor) -> None:
        """Make the distances of these rows, which are bounds that know all chosen rows, exact."""
        for rows, others in self.behind(rows_K, self.exact_N):
            distance_K = self.distance_N[rows]
            # Who is farther than the bound for certain need not be computed.
            i, j = (self.bounds(rows, others, LOWER) <= distance_K[:, None]).nonzero(as_tuple=True)
            pairs = squared_distances(self.features_ND, rows[i], self.features_ND, others[j])
            self.distance_N[rows] = distance_K.scatter_reduce_(0, i, pairs, "amin")
        self.exact_N[rows_K] = self.count

    def farthest(self, number: int, among_M: Tensor | None = None) -> tuple[Tensor, float]:
        """So many of the rows, those farthest by ``distance_N``, and a distance that no other of the rows exceeds."""
        distance_M = self.distance_N if among_M is None else self.distance_N[among_M]
        if number < len(distance_M):
            values, best = distance_M.topk(number + 1)
            best, limit = best[:-1], float(values[-1])
        else:
            best, limit = torch.arange(len(distance_M), device=distance_M.device), CHOSEN
        return best if among_M is None else among_M[best], limit

    def choose_more(self) -> None:
        """Look closer and closer at the farthest rows, and pick as long as no other row could be farther."""
        rows, limit = self.farthest(self.block)
        self.bound(rows)
        rows, next_best = self.farthest(max(SETTLED, self.block // 4), rows)
        limit = max(limit, next_best)
        self.settle(rows)
        distances = self.distance_N[rows]
        farthest = float(distances.amax())
        if farthest <= limit:  # another row may be as far: look at more
            self.block *= 2
            return
        self.block = max(REFRESHED, self.block // 2)
        if farthest == 0:
            rest = (self.distance_N == 0).nonzero()[:, 0]
            self.chosen[self.count :] = rest[: len(self.chosen) - self.count]
            self.count = len(self.chosen)
            return
        first = rows[distances == farthest].amin()
        rows, next_best = self.farthest(SETTLED, rows)
        self.pick(torch.cat([rows, first[None]]).unique(), max(limit, next_best))

    def pick(self, rows_T: Tensor, limit: float) -> None:
        """Pick among ascending rows whose distances are exact: the farthest, then more while they are beyond `limit`.

        A pick lowers the others' distances to bounds; these are made exact only for a row that comes first by them.
        """
        # Small arrays: NumPy's calls are several times shorter than torch's, and no device is asked at every pick.
        lower: NDArray[np.floating] = self.bounds(rows_T, rows_T, LOWER).cpu().numpy()
        upper: NDArray[np.floating] = self.bounds(rows_T, rows_T, UPPER).cpu().numpy()
        distance: NDArray[np.floating] = self.distance_N[rows_T].cpu().numpy()
        exact = np.ones(len(distance), dtype=bool)
        picks: list[int] = []
        while self.count + len(picks) < len(self.chosen):
            last = int(distance.argmax())
            if picks and distance[last] <= limit:
                break
            if exact[last]:
                picks.append(last)
                exact &= lower[last] > distance
                np.minimum(distance, upper[last], out=distance)
                distance[last] = CHOSEN
            else:
                near = [p for p in picks if lower[p, last] <= distance[last]]
                left, right = (rows_T[torch.tensor(i, device=rows_T.device)] for i in ([last] * len(near), near))
                pairs = squared_distances(self.features_ND, left, self.features_ND, right)
                distance[last] = min(distance[last], float(pairs.amin()))
                exact[last] = True
        before, self.count = self.count, self.count + len(picks)
        self.chosen[before : self.count] = rows_T[torch.tensor(picks, device=rows_T.device)]
        self.distance_N[rows_T] = torch.from_numpy(distance).to(rows_T.device)
        self.bounded_N[rows_T] = self.count
        self.exact_N[rows_T[torch.from_numpy(exact).to(rows_T.device)]] = self.count
