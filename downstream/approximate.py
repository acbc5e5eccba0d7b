"""Approximate nearest neighbours in a large bank: faiss's inverted lists of product-quantised rows (IVFPQ).

For banks that are too large to be searched exactly (PatchCore-100%, PatchCore Sec. 4.3). The faiss extra is needed.

Shapes: Q queries and N bank rows of D channels, k neighbours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from downstream.distances import check_rows, squared_distances
from downstream.neighbours import import_faiss

CODES = 256  # a part of a row is stored as one byte


class ApproximateNeighbours:
    """A bank quantised for approximate searches.

    ``bank_ND``: floats on the CPU. ``nlist``: cells the bank is divided into, 1 to N; ``nprobe``: cells that a query
    looks into; ``m``: parts a row is cut into, one byte each, a divisor of D. By default nlist is about 4 sqrt(N) but
    leaves 39 rows to a cell (faiss's advice), m the divisor next to D / 8, nprobe an eighth of nlist.
    ``refine`` * k candidates have their distances computed from the bank itself, which is kept for it.

    Raises ValueError without faiss, and where the bank is too small or nlist, m or nprobe do not fit.
    """

    def __init__(
        self,
        bank_ND: Tensor,
        nlist: int | None = None,
        m: int | None = None,
        nprobe: int | None = None,
        refine: int = 4,
        seed: int = 0,
    ) -> None:
        faiss = import_faiss()
        check_rows(bank_ND, "bank")
        rows, width = bank_ND.shape
        if bank_ND.device.type != "cpu" or bank_ND.dtype == torch.float64:
            raise ValueError(f"IVFPQ needs a float32 bank on the CPU, this one is {bank_ND.dtype} on {bank_ND.device}")
        if rows < CODES:
            raise ValueError(f"IVFPQ learns {CODES} codes and needs as many rows, the bank has {rows}; use Neighbours")
        nlist = max(1, min(round(4 * math.sqrt(rows)), rows // 39)) if nlist is None else nlist
        if not 1 <= nlist <= rows:
            raise ValueError(f"nlist {nlist} cells for {rows} rows; choose 1 to {rows}, better at most {rows // 39}")
        divisors = [part for part in range(1, width + 1) if width % part == 0]
        m = min(divisors, key=lambda part: abs(part - width / 8)) if m is None else m
        if m not in divisors:
            raise ValueError(f"m {m} does not divide {width} channels; choose one of {', '.join(map(str, divisors))}")
        nprobe = max(1, nlist // 8) if nprobe is None else nprobe
        if not 1 <= nprobe <= nlist:
            raise ValueError(f"nprobe {nprobe} of {nlist} cells; choose 1 to {nlist}")
        if refine < 1:
            raise ValueError(f"refine {refine}; expected at least 1")
        self.bank_ND = bank_ND.detach().float().contiguous()
        self.centre_D = self.bank_ND.mean(0)
        self.refine = refine
        self.index = faiss.IndexIVFPQ(faiss.IndexFlatL2(width), width, nlist, m, 8)
        self.index.cp.seed = self.index.pq.cp.seed = seed
        # Few rows to a centre are the caller's choice, not worth a warning on the terminal.
        self.index.cp.min_points_per_centroid = self.index.pq.cp.min_points_per_centroid = 1
        shifted = (self.bank_ND - self.centre_D).numpy()
        self.index.train(shifted)
        self.index.add(shifted)
        self.index.nprobe = nprobe

    def search(self, query_QD: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """Euclidean distances to k near rows, ascending, and their indices: [Q, k] float32, [Q, k] int64. The distances
        are those of the rows; the rows may not be the nearest. Where the visited cells hold fewer than k rows, the
        rest is infinity and -1. Raises ValueError if k or the queries do not fit the bank.
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
