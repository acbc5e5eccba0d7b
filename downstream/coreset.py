"""A few rows that stand for all: PatchCore's greedy k-centre coreset (PatchCore Alg. 1), exact and by blocks.

The plain loop meets all N rows for every pick. Here a row's distance to the chosen rows is an upper bound that is
brought up to date only when the row could be picked next: distances can only fall, so a row whose exact distance is
beyond all bounds is the farthest of all. Rows are brought up to date in blocks, by one matrix product with the rows
chosen since. Products are rounded; every pair that decides is computed again (`downstream.distances`), hence the picks
are those of the plain loop.

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
REFRESHED = 1024  # rows brought up to date at once, at least
SETTLED = 256  # rows made exact at once, at least; as many, at most, among which picks are made without the others
CHUNK = 2048  # the largest matrix product is CHUNK x CHUNK
CHOSEN = -1.0


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


def check_amount(amount: float) -> None:
    """Raises ValueError unless it is a share in (0, 1], if it is a float, or a number of rows, at least 1."""
    if isinstance(amount, bool) or not (0 < amount <= 1 or (isinstance(amount, int) and amount > 0)):
        raise ValueError(f"amount {amount!r}; expected a share in (0, 1] as a float or a number of rows as an int")


def _count(amount: float, rows: int) -> int:
    check_amount(amount)
    if isinstance(amount, int):
        if not 1 <= amount <= rows:
            raise ValueError(f"{amount} rows of {rows}; choose 1 to {rows}, or a share such as 0.1")
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
    check_matrix(features_ND, "features")  # that they are finite is seen by their norms
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
        self.block, self.settled = rows, SETTLED  # how many rows to bring up to date, and to make exact, next
        self.bounded_N = torch.ones(rows, dtype=torch.int64, device=device)
        self.exact_N = torch.zeros_like(self.bounded_N)
        self.distance_N = torch.empty(rows, dtype=self.dtype, device=device)
        self.norm_N = torch.empty_like(self.distance_N)
        # Near the mean the norms are small, and with them the rounding. A sample's mean does as well.
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
        """Bounds of the distances of all pairs less the rows' biases, and these: [K, P], [K]."""
        left_KD, right_PD = self.shifted(rows_K), self.shifted(others_P)
        biases_K, biases_P = (self.biases_N[side].index_select(0, i) for i in (rows_K, others_P))
        return self.rounding.bounds(left_KD, right_PD, biases_P, side), biases_K

    def behind(self, rows_K: Tensor, known_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of those rows that do not know all chosen rows, each with a block of chosen rows to meet."""
        known_K = known_N.index_select(0, rows_K)
        # A row at distance 0 cannot come closer.
        late = (known_K < self.count) & (self.distance_N.index_select(0, rows_K) > 0)
        known_K, order = known_K.masked_fill_(~late, self.count).sort()
        rows_K = rows_K.index_select(0, order)
        for first in range(0, int(late.sum()), CHUNK):
            for others in self.chosen[int(known_K[first]) : self.count].split(CHUNK):
                yield rows_K[first : first + CHUNK], others

    def bound(self, rows_K: Tensor) -> None:
        """Lower the distances of these rows to bounds that know all chosen rows."""
        for rows, others in self.behind(rows_K, self.bounded_N):
            upper_KP, biases_K = self.bounds(rows, others, UPPER)
            self.distance_N.scatter_reduce_(0, rows, upper_KP.amin(1).add_(biases_K), "amin")
        self.bounded_N.index_fill_(0, rows_K, self.count)

    def settle(self, rows_K: Tensor) -> None:
        """Make the distances of these rows, which are bounds that know all chosen rows, exact."""
        for rows, others in self.behind(rows_K, self.exact_N):
            lower_KP, biases_K = self.bounds(rows, others, LOWER)
            # Who is farther than the bound for certain need not be computed.
            near_KP = lower_KP.add_(biases_K[:, None]) <= self.distance_N.index_select(0, rows)[:, None]
            i, j = near_KP.nonzero(as_tuple=True)
            pairs = squared_distances(self.features_ND, rows[i], self.features_ND, others[j])
            self.distance_N.scatter_reduce_(0, rows[i], pairs, "amin")
        self.exact_N.index_fill_(0, rows_K, self.count)

    def farthest(self, number: int, among_M: Tensor | None = None) -> tuple[Tensor, float]:
        """So many of the rows, those farthest by ``distance_N``, and a distance that no other of the rows exceeds."""
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
        """Look closer and closer at the farthest rows, and pick as long as no other row could be farther."""
        rows, outer = self.farthest(self.block)
        self.bound(rows)
        rows, inner = self.farthest(self.settled, rows)
        self.settle(rows)
        distances = self.distance_N[rows]
        farthest = float(distances.amax())
        more = min(2 * self.block, len(self.distance_N))
        if farthest <= max(outer, inner):  # another row may be as far: look at more
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
        # Whose bounds ended the picks? No more rows than before are needed for no more picks.
        if outer <= inner:
            self.block = max(REFRESHED, self.block // 2)
        elif len(self.chosen) - self.count > self.count - before:
            self.block = more
        self.settled = max(SETTLED, self.settled // 2)

    def pick(self, rows_T: Tensor, limit: float) -> None:
        """Pick among ascending rows whose distances are exact: the farthest, then more while they are beyond `limit`.

        A pick leaves the others' distances between two bounds; one is made exact where these do not tell who is next.
        """
        # Small arrays: NumPy's calls are several times shorter than torch's, and no device is asked at every pick.
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
