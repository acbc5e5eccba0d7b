"""Squared distances that are reproducible to the last bit, and bounds of the rounding errors of a matrix product.

A search over many pairs takes its distances from one matrix product, ||a - b||^2 = ||a||^2 + ||b||^2 - 2 a.b, which is
fast but has rounding errors; the pairs that decide are computed again as sum (a - b)^2. `rounding` bounds the
difference for any order of additions in hardware, so that no pair that could decide is left out.

Shapes: N rows of D channels, M pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LOWER, UPPER = -1, 1  # sides of a bound
BLOCK_ELEMENTS = 1 << 17  # rows are gathered and subtracted in blocks that fit in a core's cache


def check_matrix(rows_ND: Tensor, name: str) -> None:
    """Raise ValueError unless `rows_ND` is a floating-point matrix with at least one element."""
    if rows_ND.ndim != 2 or rows_ND.numel() == 0:
        raise ValueError(f"{name} of shape {tuple(rows_ND.shape)}; expected [N, D] with N, D > 0 (one row per token)")
    if not rows_ND.is_floating_point():
        raise ValueError(f"{name} of type {rows_ND.dtype}; expected floating-point numbers, e.g. {name}.float()")


def check_rows(rows_ND: Tensor, name: str) -> None:
    """Raise ValueError unless `rows_ND` is a floating-point matrix with at least one element, all of them finite."""
    check_matrix(rows_ND, name)
    step = rows_per_block(rows_ND.shape[1])
    # The sum of a block is finite only if all elements are; a sum that is not may also have overflowed.
    for start, block in zip(range(0, rows_ND.shape[0], step), rows_ND.split(step), strict=True):
        if not block.sum(dtype=compute_type(rows_ND)).isfinite():
            bad = (~block.isfinite()).any(1).nonzero()[:, 0]
            if len(bad):
                raise ValueError(f"{name} hold a NaN or an infinity, the first in row {start + int(bad[0])}; remove it")


def compute_type(rows_ND: Tensor) -> torch.dtype:
    """Return the type in which distances are computed: that of the rows, or float32 for half precision."""
    return torch.promote_types(rows_ND.dtype, torch.float32)


def rows_per_block(width: int) -> int:
    return max(1, BLOCK_ELEMENTS // width)


def sums_of_squares(rows_MD: Tensor) -> Tensor:
    """Sum the squares of rows [M, D], which are overwritten: [M], the same bits for any number of rows.

    torch adds up a row of a contiguous matrix in an order that depends only on its width (on a CPU; on an accelerator
    it may depend on M), but threads may share the sum of a single row.
    """
    squares_MD = torch.mul(rows_MD, rows_MD, out=rows_MD)
    return torch.cat([squares_MD, squares_MD]).sum(1)[:1] if len(squares_MD) == 1 else squares_MD.sum(1)


def squared_distances(left_ND: Tensor, left_M: Tensor, right_ND: Tensor, right_M: Tensor) -> Tensor:
    """Return exactly ``(left_ND[left_M] - right_ND[right_M]).square().sum(1)``, squared distances [M] of pairs."""
    dtype = compute_type(left_ND)
    out_M = torch.empty(len(left_M), dtype=dtype, device=left_ND.device)
    step = rows_per_block(left_ND.shape[1])
    for start in range(0, len(left_M), step):
        # index_select is twice as fast as indexing with a tensor.
        difference = left_ND.index_select(0, left_M[start : start + step]).to(dtype)
        difference -= right_ND.index_select(0, right_M[start : start + step])
        out_M[start : start + step] = sums_of_squares(difference)
    return out_M


@dataclass(frozen=True)
class Rounding:
    """Bounds of `squared_distances` from a matrix product, for any order of additions.

    With z = fl(x - m) for any fixed m and n = fl(||z||^2), fl(n_i + n_j - 2 z_i.z_j) differs from ||x_i - x_j||^2 by at
    most ``norms`` (n_i + n_j) + ``tiny``, the computed distance by a factor of at most 1 +- ``total``, and ``tiny``.
    """

    norms: float
    total: float
    tiny: float

    def biases(self, norms_N: Tensor, side: int) -> Tensor:
        """Decrease (side LOWER) or increase (UPPER) the squared norms, so that `bounds` are on that side: [N]."""
        return norms_N * ((1 + side * self.norms) * (1 + side * self.total)) + side * self.tiny

    def widths(self, norms_N: Tensor) -> Tensor:
        """Return what to add to the lower bound of a pair, for each of its two rows, to get an upper bound: [N].

        It covers the margins below and above; the distance itself is at most 2 (n_i + n_j).
        """
        return norms_N * (2.2 * self.norms + 4.4 * self.total) + 3 * self.tiny

    def bounds(self, left_KD: Tensor, right_PD: Tensor, right_P: Tensor, side: int) -> Tensor:
        """Bound the computed distances of all pairs of shifted rows, minus the biases of the left rows: [K, P]."""
        return torch.addmm(right_P, left_KD, right_PD.T, alpha=-2 * (1 + side * self.total))

    def factor(self, left_KD: Tensor, side: int) -> Tensor:
        """Return a matrix whose product with [right_PD, right_P].T equals `bounds`, for repeated use: [K, D + 1]."""
        return F.pad(left_KD * (-2 * (1 + side * self.total)), (0, 1), value=1.0)


def rounding(width: int, dtype: torch.dtype) -> Rounding:
    """Return the bounds for rows of `width` channels. Raises ValueError if `dtype` is too coarse for that many.

    With unit roundoff u, the error of a sum of D products is at most D u sum |a_c b_c|. Both norms contribute
    D u (n_i + n_j); the product with n_j added, (D + 2) u (n_i + 2 n_j); the shift by m, 4.2 u (n_i + n_j); and the
    remaining operations, less than 12 u (n_i + n_j). Second-order terms are within 5 %.
    """
    unit = torch.finfo(dtype).eps / 2
    if width * unit > 0.01:
        raise ValueError(f"{width} channels are too many for distances in {dtype}; convert the features to float64")
    return Rounding(1.05 * (3 * width + 24) * unit, 1.05 * (width + 2) * unit, 8 * width * torch.finfo(dtype).tiny)
