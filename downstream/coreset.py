"""Subsampling of rows: PatchCore's greedy k-centre coreset (PatchCore Alg. 1), computed exactly and in blocks.

The plain loop computes distances to all N rows for every pick. Here each row has an upper bound of its distance to the
chosen rows, which is updated only when the row could be picked next: distances can only fall, so a row whose exact
distance exceeds all bounds is the farthest. Rows are updated in blocks, by one matrix product with the rows chosen
since their last update. Products are rounded, so every pair that decides is computed again (`downstream.distances`),
and the picks are those of the plain loop.

Shapes: N rows of D channels, K of them in a block, P chosen rows, T candidates for the next picks, k rows to choose.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adpretrain.device import full_precision
from adpretrain.progress import Progress
from downstream.distances import (
    LOWER,
    UPPER,
    check_matrix,
    check_rows,
    compute_type,
    rounding,
    rows_per_block,
    squared_distances,
    sums_of_squares,
)

METHODS = ("greedy", "random", "none")
REFRESHED = 1024  # bounds are updated for at least this many rows at once
SETTLED = 256  # at least this many rows are made exact at once, and at most this many are picked among
CHUNK = 2048  # the largest matrix product is CHUNK x CHUNK
CHOSEN = -1.0  # the distance of a row that is chosen


def subsample(
    features_ND: Tensor,
    amount: float,
    method: str = "greedy",
    start: int = 0,
    projection_dim: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Return the indices of the rows to keep: [k] int64, on the device of the features.

    ``amount`` is a share of the rows if it is a float in (0, 1] (PatchCore-1% is 0.01; at least one row is kept), or
    their number if it is an int. ``method`` is "greedy" (`greedy_coreset`, in the order of choice), "random" (uniform,
    without replacement, from ``seed``; ascending) or "none" (all rows, whatever the amount).

    Raises ValueError for any other method or amount.
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


def check_amount(amount: float) -> None:
    """Raise ValueError unless ``amount`` is a float in (0, 1], a share, or an int of at least 1, a number of rows."""
    if isinstance(amount, bool) or not (0 < amount <= 1 or (isinstance(amount, int) and amount > 0)):
        raise ValueError(f"amount {amount!r}; expected a share in (0, 1] as a float or a number of rows as an int")


def _count(amount: float, rows: int) -> int:
    check_amount(amount)
    if isinstance(amount, int):
        if not 1 <= amount <= rows:
            raise ValueError(f"cannot keep {amount} rows of {rows}; choose 1 to {rows}, or a share such as 0.1")
        return amount
    return max(1, round(amount * rows))


def greedy_coreset(
    features_ND: Tensor,
    k: int,
    start: int = 0,
    projection_dim: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Choose greedy k-centres (PatchCore Alg. 1): row ``start``, then always the row farthest from those chosen.

    Returns k distinct indices in the order of choice: [k] int64. They are exactly those of the plain loop

        nearest = full([N], inf)
        repeat: nearest = minimum(nearest, (features - features[last]).square().sum(1))
                nearest[chosen] = -1;  last = nearest.argmax()

    with distances in the type of the features (float32 for half precision); of ties, the lowest index is taken. When
    every remaining row equals a chosen one, the remaining indices follow in ascending order. This assumes that torch's
    sum of a row does not depend on the number of rows. That is true on a CPU; on an accelerator, rows whose distances
    differ only in the last bits may be chosen in another order.

    With ``projection_dim``, distances are computed after a Gaussian random projection to so many channels, drawn from
    ``seed`` (Johnson-Lindenstrauss; PatchCore Sec. 3.2), which is faster but changes the choice. ``progress(what, done,
    total)`` gets the number of chosen rows. Memory besides the features: about 30 N bytes, some tens of MiB, and the
    projected features.
    Raises ValueError if the features are not a finite [N, D] matrix, or k, start or projection_dim are out of range.
    """
    check_matrix(features_ND, "features")  # their norms show later whether they are finite
    rows = features_ND.shape[0]
    if not 1 <= k <= rows:
        raise ValueError(f"cannot choose a coreset of {k} rows from {rows}; choose 1 to {rows}")
    if not 0 <= start < rows:
        raise ValueError(f"start {start} is not the index of a row; choose 0 to {rows - 1}")
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
    """Apply a Gaussian random projection that keeps squared distances in expectation: [N, dim]. Its matrix depends only
    on the seed, D and dim. Raises ValueError if ``dim`` is not in 1..D."""
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

    ``distance_N`` holds upper bounds of each row's squared distance (as `squared_distances` computes it) to the chosen
    rows, of which the first ``bounded_N`` are considered, and the first ``exact_N`` exactly. Chosen rows have -1.
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
        self.block, self.settled = rows, SETTLED  # numbers of rows to update, and to make exact, next
        self.bounded_N = torch.ones(rows, dtype=torch.int64, device=device)
        self.exact_N = torch.zeros_like(self.bounded_N)
        self.distance_N = torch.empty(rows, dtype=self.dtype, device=device)
        self.norm_N = torch.empty_like(self.distance_N)
        # Subtracting the mean (of a sample is enough) makes norms small, and with them the rounding errors.
        self.centre_D = features_ND[:: max(1, rows // CHUNK)].mean(0, dtype=self.dtype)
        first_1D = self.shifted(self.chosen[:1])
        first_1 = self.rounding.biases(sums_of_squares(first_1D.clone()), UPPER)
        step = rows_per_block(width)
        for i in range(0, rows, step):
            block = features_ND[i : i + step].to(self.dtype) - self.centre_D
            self.distance_N[i : i + step] = self.rounding.bounds(block, first_1D, first_1, UPPER)[:, 0]
            self.norm_N[i : i + step] = sums_of_squares(block)
        if not bool(self.norm_N.amax() * 8 < torch.finfo(self.dtype).max):
            check_rows(features_ND, "features")
            raise ValueError(f"features are so large that their squared distances overflow {self.dtype}; scale them")
        self.biases_N = {side: self.rounding.biases(self.norm_N, side) for side in (LOWER, UPPER)}
        self.distance_N += self.biases_N[UPPER]
        self.distance_N[start] = CHOSEN

    def shifted(self, rows_K: Tensor) -> Tensor:
        return self.features_ND.index_select(0, rows_K).to(self.dtype).sub_(self.centre_D)

    def bounds(self, rows_K: Tensor, others_P: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Return bounds of the distances of all pairs, minus the rows' biases, and these biases: [K, P], [K]."""
        left_KD, right_PD = self.shifted(rows_K), self.shifted(others_P)
        biases_K, biases_P = (self.biases_N[side].index_select(0, i) for i in (rows_K, others_P))
        return self.rounding.bounds(left_KD, right_PD, biases_P, side), biases_K

    def behind(self, rows_K: Tensor, known_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield blocks of rows not yet compared with all chosen rows, each with a block of chosen rows to compare."""
        known_K = known_N.index_select(0, rows_K)
        # A row at distance 0 cannot get closer.
        late = (known_K < self.count) & (self.distance_N.index_select(0, rows_K) > 0)
        known_K, order = known_K.masked_fill_(~late, self.count).sort()
        rows_K = rows_K.index_select(0, order)
        for first in range(0, int(late.sum()), CHUNK):
            for others in self.chosen[int(known_K[first]) : self.count].split(CHUNK):
                yield rows_K[first : first + CHUNK], others

    def bound(self, rows_K: Tensor) -> None:
        """Update the bounds of these rows, so that they take all chosen rows into account."""
        for rows, others in self.behind(rows_K, self.bounded_N):
            upper_KP, biases_K = self.bounds(rows, others, UPPER)
            self.distance_N.scatter_reduce_(0, rows, upper_KP.amin(1).add_(biases_K), "amin")
        self.bounded_N.index_fill_(0, rows_K, self.count)

    def settle(self, rows_K: Tensor) -> None:
        """Make the distances of these rows, whose bounds are up to date, exact."""
        for rows, others in self.behind(rows_K, self.exact_N):
            lower_KP, biases_K = self.bounds(rows, others, LOWER)
            # A pair that is certainly farther apart than the bound need not be computed.
            near_KP = lower_KP.add_(biases_K[:, None]) <= self.distance_N.index_select(0, rows)[:, None]
            i, j = near_KP.nonzero(as_tuple=True)
            pairs = squared_distances(self.features_ND, rows[i], self.features_ND, others[j])
            self.distance_N.scatter_reduce_(0, rows[i], pairs, "amin")
        self.exact_N.index_fill_(0, rows_K, self.count)

    def farthest(self, number: int, among_M: Tensor | None = None) -> tuple[Tensor, float]:
        """Return the ``number`` farthest rows by ``distance_N``, and a distance that none of the others exceeds."""
        distance_M = self.distance_N if among_M is None else self.distance_N[among_M]
        if number < len(distance_M):
            values, best = distance_M.topk(number + 1, sorted=False)
            least = int(values.argmin())
            limit = float(values[least])
            best[least] = best[-1]
            best = best[:-1]
        else:
            best, limit = torch.arange(len(distance_M), device=distance_M.device), CHOSEN
        return best if among_M is None else among_M[best], limit

    def choose_more(self) -> None:
        """Update the farthest rows, make the farthest of these exact, and pick while no other row could be farther."""
        rows, outer = self.farthest(self.block)
        self.bound(rows)
        rows, inner = self.farthest(self.settled, rows)
        self.settle(rows)
        distances = self.distance_N[rows]
        farthest = float(distances.amax())
        more = min(2 * self.block, len(self.distance_N))
        if farthest <= max(outer, inner):  # another row may be as far, so more must be updated
            self.block, self.settled = more, 2 * self.settled
            return
        if farthest == 0:
            rest = (self.distance_N == 0).nonzero()[:, 0]
            self.chosen[self.count :] = rest[: len(self.chosen) - self.count]
            self.count = len(self.chosen)
            return
        if len(rows) > SETTLED:
            first = rows[distances == farthest].amin()
            rows, next_best = self.farthest(SETTLED, rows)
            rows, inner = torch.cat([rows[rows != first], first[None]]), max(inner, next_best)
        before = self.count
        self.pick(rows.sort().values, max(outer, inner))
        # Adapt the numbers of rows to whichever bound ended the picks.
        if outer <= inner:
            self.block = max(REFRESHED, self.block // 2)
        elif len(self.chosen) - self.count > self.count - before:
            self.block = more
        self.settled = max(SETTLED, self.settled // 2)

    def pick(self, rows_T: Tensor, limit: float) -> None:
        """Pick among ascending rows whose distances are exact: the farthest, then more while they exceed `limit`.

        After a pick, distances of the others are known within two bounds; they are made exact only if that decides.
        """
        # NumPy is several times faster than torch for small arrays, and needs no device synchronisation at every pick.
        rows_TD, biases_T = self.features_ND.index_select(0, rows_T).to(self.dtype), self.biases_N[LOWER][rows_T]
        shifted_TD, features = rows_TD - self.centre_D, rows_TD.cpu().numpy()
        lower_TT = self.rounding.bounds(shifted_TD, shifted_TD, biases_T, LOWER).add_(biases_T[:, None])
        lower: NDArray[np.floating] = lower_TT.cpu().numpy()
        width: NDArray[np.floating] = self.rounding.widths(self.norm_N[rows_T]).cpu().numpy()
        high: NDArray[np.floating] = self.distance_N[rows_T].cpu().numpy()
        low = high.copy()
        picks: list[int] = []
        while self.count + len(picks) < len(self.chosen):
            last = int(high.argmax())
            farthest = high[last]
            if picks and farthest <= limit:
                break
            if low[last] < farthest:
                high[last] = limit
                if low[last] <= high.max():  # another row may be as far
                    near = np.array(picks)[lower[picks, last] <= farthest]
                    pairs = sums_of_squares(torch.from_numpy(features[near] - features[last]))
                    low[last] = high[last] = min(farthest, pairs.numpy().min())
                    continue
            picks.append(last)
            np.minimum(low, lower[last], out=low)
            np.minimum(high, lower[last] + (width + width[last]), out=high)
            high[last] = low[last] = CHOSEN
        before, self.count = self.count, self.count + len(picks)
        self.chosen[before : self.count] = rows_T[torch.tensor(picks, device=rows_T.device)]
        self.distance_N[rows_T] = torch.from_numpy(high).to(rows_T.device)
        self.bounded_N[rows_T] = self.count
        self.exact_N[rows_T[torch.from_numpy(low == high).to(rows_T.device)]] = self.count
