"""What a squared distance is, to the last bit, and how far a matrix product may be from it.

A search over many pairs takes its distances from one matrix product, ||a - b||^2 = ||a||^2 + ||b||^2 - 2 a.b, which is
fast and rounded; the pairs that decide are computed again as sum (a - b)^2. `rounding` bounds the difference of the
two, whatever the order in which the hardware adds, so that no pair that could decide is left out.

Shapes: N rows of D channels, M pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LOWER, UPPER = -1, 1  # sides of a bound
BLOCK_ELEMENTS = 1 << 17  # rows are gathered and subtracted in blocks that stay in a core's cache


def check_matrix(rows_ND: Tensor, name: str) -> None:
    """Raises ValueError unless `rows_ND` is a floating-point matrix with at least one element."""
    if rows_ND.ndim != 2 or rows_ND.numel() == 0:
        raise ValueError(f"{name} of shape {tuple(rows_ND.shape)}; expected [N, D] with N, D > 0 (one row a token)")
    if not rows_ND.is_floating_point():
        raise ValueError(f"{name} of type {rows_ND.dtype}; expected floating-point numbers, e.g. {name}.float()")


def check_rows(rows_ND: Tensor, name: str) -> None:
    """Raises ValueError unless `rows_ND` is a floating-point matrix with at least one element, all of them finite."""
    check_matrix(rows_ND, name)
    step = rows_per_block(rows_ND.shape[1])
    # The sum of a block is finite only if all of it is; a sum that overflows is looked at again.
    for start, block in zip(range(0, rows_ND.shape[0], step), rows_ND.split(step), strict=True):
        if not block.sum(dtype=compute_type(rows_ND)).isfinite():
            bad = (~block.isfinite()).any(1).nonzero()[:, 0]
            if len(bad):
                raise ValueError(f"{name} hold a NaN or an infinity, the first in row {start + int(bad[0])}; remove it")


def compute_type(rows_ND: Tensor) -> torch.dtype:
    """The type distances are computed in: the rows' own, and float32 for half precision."""
    return torch.promote_types(rows_ND.dtype, torch.float32)


def rows_per_block(width: int) -> int:
    return max(1, BLOCK_ELEMENTS // width)


def sums_of_squares(rows_MD: Tensor) -> Tensor:
    """[M, D], which is overwritten, -> [M]: the same bits as ``rows_MD.square().sum(1)`` of any number of rows.

    torch adds up a row of a contiguous matrix in an order that depends on its width alone (on a CPU; on an accelerator
    it may depend on M), but threads may share the sum of a single row.
    """
    squares_MD = torch.mul(rows_MD, rows_MD, out=rows_MD)
    return torch.cat([squares_MD, squares_MD]).sum(1)[:1] if len(squares_MD) == 1 else squares_MD.sum(1)


def squared_distances(left_ND: Tensor, left_M: Tensor, right_ND: Tensor, right_M: Tensor) -> Tensor:
    """Of M pairs of rows: the same bits as ``(left_ND[left_M] - right_ND[right_M]).square().sum(1)``, [M]."""
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

    With z = fl(x - m) for any fixed m and n = fl(||z||^2): fl(n_i + n_j - 2 z_i.z_j) is off from ||x_i - x_j||^2 by at
    most ``norms`` (n_i + n_j) + ``tiny``, the computed distance by a factor of at most 1 +- ``total``, and ``tiny``.
    """

    norms: float
    total: float
    tiny: float

    def biases(self, norms_N: Tensor, side: int) -> Tensor:
        """The squared norms, shrunk (side LOWER) or grown (UPPER) so that `bounds` are on that side: [N]."""
        return norms_N * ((1 + side * self.norms) * (1 + side * self.total)) + side * self.tiny

    def widths(self, norms_N: Tensor) -> Tensor:
        """What to add to a pair's lower bound, once for each of its rows, for an upper one: [N].

        The margin below is spent once more, and once above; the distance itself is at most 2 (n_i + n_j).
        """
        return norms_N * (2.2 * self.norms + 4.4 * self.total) + 3 * self.tiny

    def bounds(self, left_KD: Tensor, right_PD: Tensor, right_P: Tensor, side: int) -> Tensor:
        """Bounds of all pairs' computed distances, less the left rows' biases, from shifted rows: [K, P]."""
        return torch.addmm(right_P, left_KD, right_PD.T, alpha=-2 * (1 + side * self.total))

    def factor(self, left_KD: Tensor, side: int) -> Tensor:
        """A matrix whose product with [right_PD, right_P].T is the same, for right rows met often: [K, D + 1]."""
        return F.pad(left_KD * (-2 * (1 + side * self.total)), (0, 1), value=1.0)


def rounding(width: int, dtype: torch.dtype) -> Rounding:
    """The bounds for rows of `width` channels. Raises ValueError if `dtype` is too coarse for so many.

    With unit roundoff u, a sum of D products is off by at most D u sum |a_c b_c|. Both norms: D u (n_i + n_j); the
    product with n_j added to it: (D + 2) u (n_i + 2 n_j); the shift by m moves the distance by 4.2 u (n_i + n_j), the
    remaining operations by less than 12 u (n_i + n_j). Second-order terms are within 5 %.
    """
    unit = torch.finfo(dtype).eps / 2
    if width * unit > 0.01:
        raise ValueError(f"{width} channels are too many for distances in {dtype}; convert the features to float64")
    return Rounding(1.05 * (3 * width + 24) * unit, 1.05 * (width + 2) * unit, 8 * width * torch.finfo(dtype).tiny)
