"""Nearest neighbours in a bank of features: exact ones with torch or faiss, and approximate ones with faiss.

Exact distances and indices are the same to the last bit with torch and faiss. Both propose a few candidates from
rounded distances, and a lower bound for the distances of all other rows. The distances of the candidates are then
computed again (`downstream.distances`); if the k-th is not below that bound (nearly equal rows), the query is compared
with every row that could be as near. Of ties, the lowest index is taken.

Shapes: Q queries and N bank rows of D channels, c candidates, k neighbours, M pairs.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from adpretrain.device import full_precision
from downstream.distances import (
    LOWER,
    check_rows,
    compute_type,
    rounding,
    squared_distances,
    sums_of_squares,
)

BACKENDS = ("auto", "torch", "faiss")
CHUNK_BYTES = 64 << 20  # largest [queries x bank] block of distances in memory
QUERIES = {"torch": 512, "faiss": 4096}  # queries per block; faiss is ten times slower with a few hundred
UNPROVEN = 64  # queries per block, if they are compared with every row that could be as near
BLOCK = 32  # columns whose minimum is searched together
SPARE = 7  # number of candidates besides the k nearest
CODES = 256  # each part of an approximated row is stored as one byte


def nearest(
    query_QD: Tensor, bank_ND: Tensor, k: int = 1, backend: str = "auto", chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """Return Euclidean distances to the k nearest rows, ascending, and their indices: [Q, k], [Q, k] int64.

    `Neighbours` prepares a bank once for many searches.
    """
    return Neighbours(bank_ND, backend, chunk_bytes).search(query_QD, k)


class Neighbours:
    """A bank prepared for exact searches.

    ``bank_ND`` must be finite; half precision is searched in float32. ``backend`` is "torch" (any device), "faiss" (on
    the CPU, in float32; needs the package) or "auto" (faiss if it can be used); the results are equal. ``chunk_bytes``
    limits the block of distances in memory. Memory: the bank and a shifted copy.

    Raises ValueError for a bank that is not a finite matrix, an unknown backend or one that cannot search this bank.
    """

    def __init__(self, bank_ND: Tensor, backend: str = "auto", chunk_bytes: int = CHUNK_BYTES) -> None:
        check_rows(bank_ND, "bank")
        self.bank_ND = bank_ND.detach().contiguous()
        self.dtype = compute_type(bank_ND)
        self.backend = _choose(backend, self.bank_ND)
        self.chunk_bytes = chunk_bytes
        self.rounding = rounding(bank_ND.shape[1], self.dtype)
        rows, width = bank_ND.shape
        self.index: Any = import_faiss().IndexFlatL2(width) if self.backend == "faiss" else None
        # Shifted rows and their biases, as `Rounding.factor` needs them; rows that pad a block are infinitely far.
        filled = -(-rows // BLOCK) * BLOCK if self.index is None else 0
        self.factor_ND = torch.zeros(filled, width + 1, dtype=self.dtype, device=bank_ND.device)
        norm_N = torch.empty(rows, dtype=self.dtype, device=bank_ND.device)
        with full_precision(bank_ND.device):
            self.centre_D = self.bank_ND.mean(0, dtype=self.dtype)
            for start in range(0, rows, QUERIES["torch"]):
                part = slice(start, min(start + QUERIES["torch"], rows))
                shifted = self.bank_ND[part].to(self.dtype) - self.centre_D
                if self.index is None:
                    self.factor_ND[part, :-1] = shifted
                else:
                    self.index.add(shifted.numpy())
                norm_N[part] = sums_of_squares(shifted)
            self.largest = norm_N.amax()
            if not bool(self.largest * 8 < torch.finfo(self.dtype).max):
                raise ValueError(f"the bank is so large that squared distances overflow {self.dtype}; scale it")
            self.bias_N = self.rounding.biases(norm_N, LOWER)
            self.factor_ND[:rows, -1] = self.bias_N[: len(self.factor_ND)]
            self.factor_ND[rows:, -1] = torch.inf

    def search(self, query_QD: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """Return distances to the k nearest rows, ascending, and their indices: [Q, k] in the type of the bank (float32
        for half precision) and [Q, k] int64. Raises ValueError if k or the queries do not fit the bank."""
        rows, width = self.bank_ND.shape
        if not 1 <= k <= rows:
            raise ValueError(f"{k} neighbours from a bank of {rows} rows; choose 1 to {rows}")
        if query_QD.ndim != 2 or query_QD.shape[1] != width:
            raise ValueError(f"queries of shape {tuple(query_QD.shape)} do not fit the bank; expected [Q, {width}]")
        if query_QD.device != self.bank_ND.device:
            raise ValueError(
                f"queries are on {query_QD.device} but the bank on {self.bank_ND.device}; move one of them"
            )
        if not len(query_QD):
            empty = query_QD.new_empty(0, k)
            return empty.to(self.dtype), empty.to(torch.int64)
        check_rows(query_QD, "queries")
        with full_precision(query_QD.device):
            # A query of another type is first rounded to that of the bank.
            query_QD = query_QD.detach().to(self.dtype).contiguous()
            blocks = query_QD.split(QUERIES[self.backend])
            buffer = self._buffer(len(blocks[0]))
            found = [self._search(block, k, buffer) for block in blocks]
        distance_Qk, index_Qk = (torch.cat(parts) for parts in zip(*found, strict=True))
        return distance_Qk.sqrt(), index_Qk

    def _buffer(self, queries: int) -> Tensor:
        """Allocate one block for a whole search; new memory for every block would take as long as the product."""
        columns = max(BLOCK, self.chunk_bytes // (queries * self.bias_N.element_size()))
        return self.bias_N.new_empty(queries * min(columns, len(self.bias_N) + BLOCK) if self.backend == "torch" else 0)

    def _search(self, query_QD: Tensor, k: int, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Return squared distances and indices for a block of queries."""
        shifted_QD = query_QD - self.centre_D
        norm_Q = sums_of_squares(shifted_QD.clone())
        if not bool(norm_Q.amax() * 8 < torch.finfo(self.dtype).max):
            raise ValueError(f"queries are so large that squared distances overflow {self.dtype}; scale them")
        number = min(k + SPARE, len(self.bank_ND))
        if self.backend == "faiss":
            lower_Qc, index_Qc = self._propose_faiss(shifted_QD, norm_Q, number)
        else:
            lower_Qc, index_Qc = self._propose_torch(shifted_QD, norm_Q, number, buffer)
        beyond_Q = lower_Qc[:, -1]  # every other row is at least as far
        if number == len(self.bank_ND):
            beyond_Q = torch.full_like(norm_Q, torch.inf)
        distance_Qc = torch.full_like(lower_Qc, torch.inf)
        distance_Qc[:, :k] = self._distances(query_QD, index_Qc[:, :k])
        kth_Q = distance_Qc[:, :k].amax(1)
        row, column = (lower_Qc[:, k:] <= kth_Q[:, None]).nonzero(as_tuple=True)
        column += k
        distance_Qc[row, column] = squared_distances(query_QD, row, self.bank_ND, index_Qc[row, column])
        distance_Qk, index_Qk = _first(distance_Qc, index_Qc, k)
        kth_Q = distance_Qk[:, -1]
        for part in (beyond_Q <= kth_Q).nonzero()[:, 0].split(UNPROVEN):
            if len(part):
                bias_Q = self.rounding.biases(norm_Q[part], LOWER)
                everything = self._compare_all(query_QD[part], shifted_QD[part], bias_Q, kth_Q[part], k)
                distance_Qk[part], index_Qk[part] = everything
        return distance_Qk, index_Qk

    def _distances(self, query_QD: Tensor, index_Qk: Tensor) -> Tensor:
        row = torch.arange(len(query_QD), device=query_QD.device).repeat_interleave(index_Qk.shape[1])
        return squared_distances(query_QD, row, self.bank_ND, index_Qk.flatten()).view(index_Qk.shape)

    def _propose_torch(self, shifted_QD: Tensor, norm_Q: Tensor, number: int, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest lower bounds, ascending, and the indices of their rows: [Q, c] each."""
        queries = len(norm_Q)
        columns = buffer.numel() // queries // BLOCK * BLOCK
        best: tuple[Tensor, Tensor] | None = None
        factor_QD = self.rounding.factor(shifted_QD, LOWER)
        for bank, start in zip(self.factor_ND.split(columns), itertools.count(0, columns)):
            lower = torch.mm(factor_QD, bank.T, out=buffer[: queries * len(bank)].view(queries, len(bank)))
            values, index = _smallest(lower, number)
            index += start
            if best is not None:
                values, index = torch.cat([best[0], values], 1), torch.cat([best[1], index], 1)
                values, order = values.topk(min(number, values.shape[1]), largest=False)
                index = index.gather(1, order)
            best = values, index
        assert best is not None
        return best[0] + self.rounding.biases(norm_Q, LOWER)[:, None], best[1]

    def _propose_faiss(self, shifted_QD: Tensor, norm_Q: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Return the same from faiss, whose distances also come from products and norms, or are more precise."""
        values, index = (torch.from_numpy(array) for array in self.index.search(shifted_QD.numpy(), number))
        slack_Q = self.rounding.norms * (norm_Q + self.largest)
        lower_Qc = (values - slack_Q[:, None]) * (1 - self.rounding.total) - self.rounding.tiny
        return lower_Qc, index

    def _compare_all(
        self, query_QD: Tensor, shifted_QD: Tensor, bias_Q: Tensor, kth_Q: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Return the k nearest among all rows that are not certainly farther than `kth_Q`."""
        columns = max(BLOCK, self.chunk_bytes // (len(query_QD) * query_QD.element_size()))
        distance_Qk = query_QD.new_full((len(query_QD), k), torch.inf)
        index_Qk = torch.full_like(distance_Qk, len(self.bank_ND), dtype=torch.int64)
        for start in range(0, len(self.bank_ND), columns):
            block = self.bank_ND[start : start + columns].to(self.dtype) - self.centre_D
            lower = self.rounding.bounds(shifted_QD, block, self.bias_N[start : start + columns], LOWER)
            row, column = (lower <= (kth_Q - bias_Q)[:, None]).nonzero(as_tuple=True)
            distance_M = squared_distances(query_QD, row, self.bank_ND, column + start)
            # Sort by query, then distance, then index, with stable sorts of the last key first.
            distance_M, order = distance_M.sort(stable=True)
            row, by_row = row[order].sort(stable=True)
            column = column[order][by_row]
            rank = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
            first = rank < k
            row, rank = row[first], rank[first]
            more_Qk, others_Qk = torch.full_like(distance_Qk, torch.inf), torch.full_like(index_Qk, len(self.bank_ND))
            more_Qk[row, rank] = distance_M[by_row][first]
            others_Qk[row, rank] = column[first] + start
            distance_Qk, index_Qk = torch.cat([distance_Qk, more_Qk], 1), torch.cat([index_Qk, others_Qk], 1)
            distance_Qk, index_Qk = _first(distance_Qk, index_Qk, k)
        return distance_Qk, index_Qk


def _first(distance_Qc: Tensor, index_Qc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k nearest candidates by ascending distance, then ascending index."""
    index_Qc, order = index_Qc.sort(dim=1)
    distance_Qc, nearest_first = distance_Qc.gather(1, order).sort(dim=1, stable=True)
    return distance_Qc[:, :k], index_Qc.gather(1, nearest_first[:, :k])


def _smallest(lower_QN: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return the smallest values of every row, ascending, and their columns: [Q, c] each.

    One pass finds the blocks of columns with the smallest minima, and only these are searched, because torch's topk of
    long rows takes as long as the matrix product. (`adpretrain.residual` searches for one value in the same way.)
    """
    blocks = lower_QN.unflatten(1, (-1, BLOCK))
    number = min(number, lower_QN.shape[1])
    kept = min(number, blocks.shape[1])
    block_Qb = blocks.amin(2).topk(kept, largest=False).indices
    inside = blocks.gather(1, block_Qb[..., None].expand(-1, -1, BLOCK)).flatten(1)
    values, position = inside.topk(number, largest=False)
    return values, block_Qb.gather(1, position // BLOCK) * BLOCK + position % BLOCK


class ApproximateNeighbours:
    """A bank quantised for approximate searches: faiss's inverted lists of product-quantised rows (IVFPQ).

    It is for banks that are too large for exact searches (PatchCore-100%, PatchCore Sec. 4.3). ``bank_ND`` holds floats
    on the CPU. Rows are divided into about 4 sqrt(N) cells with at least 39 rows each (faiss's advice); a query visits
    ``nprobe`` of them, by default an eighth. A row is stored in parts of one byte, whose number is the divisor of D
    nearest to D / 8. The distances of ``refine`` * k candidates are computed from the bank, which is kept for that.

    Raises ValueError if faiss is missing or the bank is too small.
    """

    def __init__(self, bank_ND: Tensor, nprobe: int | None = None, refine: int = 4, seed: int = 0) -> None:
        faiss = import_faiss()
        check_rows(bank_ND, "bank")
        rows, width = bank_ND.shape
        if bank_ND.device.type != "cpu" or bank_ND.dtype == torch.float64:
            raise ValueError(f"IVFPQ needs a float32 bank on the CPU, this one is {bank_ND.dtype} on {bank_ND.device}")
        if rows < CODES:
            raise ValueError(f"IVFPQ needs at least {CODES} rows for its codes, the bank has {rows}; use Neighbours")
        cells = max(1, min(round(4 * math.sqrt(rows)), rows // 39))
        parts = min((p for p in range(1, width + 1) if width % p == 0), key=lambda p: abs(p - width / 8))
        self.bank_ND = bank_ND.detach().float().contiguous()
        self.centre_D = self.bank_ND.mean(0)
        self.refine = refine
        self.index = faiss.IndexIVFPQ(faiss.IndexFlatL2(width), width, cells, parts, 8)
        self.index.cp.seed = self.index.pq.cp.seed = seed
        # The caller chose a small bank, so faiss need not warn about few rows per centre.
        self.index.cp.min_points_per_centroid = self.index.pq.cp.min_points_per_centroid = 1
        shifted = (self.bank_ND - self.centre_D).numpy()
        self.index.train(shifted)
        self.index.add(shifted)
        self.index.nprobe = max(1, cells // 8) if nprobe is None else nprobe

    def search(self, query_QD: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """Return Euclidean distances to k near rows, ascending, and their indices: [Q, k] float32, [Q, k] int64. The
        distances are exact, but the rows may not be the nearest. If the visited cells hold fewer than k rows, the rest
        is infinity and -1. Raises ValueError if k or the queries do not fit the bank.
        """
        rows, width = self.bank_ND.shape
        if not 1 <= k <= rows:
            raise ValueError(f"{k} neighbours from a bank of {rows} rows; choose 1 to {rows}")
        if query_QD.ndim != 2 or query_QD.shape[1] != width or query_QD.device.type != "cpu":
            raise ValueError(
                f"queries of shape {tuple(query_QD.shape)} on {query_QD.device}; expected [Q, {width}] on the CPU"
            )
        check_rows(query_QD, "queries")
        query_QD = query_QD.detach().float().contiguous()
        number = min(rows, k * self.refine)
        index_Qc = torch.from_numpy(self.index.search((query_QD - self.centre_D).numpy(), number)[1])
        distance_Qc = torch.full(index_Qc.shape, torch.inf)
        row, column = (index_Qc >= 0).nonzero(as_tuple=True)
        distance_Qc[row, column] = squared_distances(query_QD, row, self.bank_ND, index_Qc[row, column])
        distance_Qk, nearest_first = distance_Qc.sort(dim=1, stable=True)
        return distance_Qk[:, :k].sqrt(), index_Qc.gather(1, nearest_first[:, :k])


def import_faiss() -> Any:
    """Import faiss. Raises ValueError with the extra to install if it is missing."""
    try:
        import faiss
    except ImportError as error:
        raise ValueError(
            "faiss is not installed: pip install 'adpretrain[faiss-cpu]' (or [faiss-gpu], not both), or choose the "
            f"exact search of backend 'torch' ({error})"
        ) from None
    return faiss


def _choose(backend: str, bank_ND: Tensor) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    fits = bank_ND.device.type == "cpu" and compute_type(bank_ND) == torch.float32
    if backend == "faiss" and not fits:
        raise ValueError(
            f"faiss searches float32 on the CPU, but the bank is {bank_ND.dtype} on {bank_ND.device}; "
            "choose backend 'torch'"
        )
    if backend == "auto":
        try:
            return "faiss" if fits and import_faiss() else "torch"
        except ValueError:
            return "torch"
    if backend == "faiss":
        import_faiss()
    return backend
