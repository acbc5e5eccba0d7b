"""The principal subspace of rows that come batch by batch, and what of a row lies outside it.

Shapes: N rows of D channels, k dimensions of the subspace.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Scatter:
    """Sums of rows and of their products, float64, in 8 D^2 bytes for any number of rows.

    Rows are shifted by the mean of the first batch, so that the products do not cancel. The sums are on the device of
    the rows, or on the CPU for MPS, which has no float64.
    """

    def __init__(self) -> None:
        self.count = 0

    @torch.no_grad()
    def add(self, rows_ND: Tensor) -> None:
        """Add rows."""
        place = "cpu" if rows_ND.device.type == "mps" else rows_ND.device
        rows_ND = rows_ND.to(place).double()
        if not self.count:
            self._shift_D = rows_ND.mean(0)
            self._total_D = torch.zeros_like(self._shift_D)
            self._products_DD = rows_ND.new_zeros(rows_ND.shape[1], rows_ND.shape[1])
        rows_ND = rows_ND - self._shift_D
        self.count += len(rows_ND)
        self._total_D += rows_ND.sum(0)
        self._products_DD.addmm_(rows_ND.T, rows_ND)

    @torch.no_grad()
    def subspace(self, variance: float) -> tuple[Tensor, Tensor]:
        """Return the mean [D] and an orthonormal basis [D, k] of the subspace, float64.

        ``variance``: the share of the variance that the subspace must exceed, or (an int) k. Raises ValueError if that
        takes all D directions, as then nothing would lie outside.
        """
        mean_D = self._total_D / self.count
        values_D, vectors_DD = torch.linalg.eigh(self._products_DD / self.count - mean_D.outer(mean_D))
        values_D, vectors_DD, width = values_D.flip(0).clamp_min(0), vectors_DD.flip(1), len(values_D)
        if isinstance(variance, int):
            kept = variance
        else:
            kept = int((values_D.cumsum(0) <= variance * values_D.sum()).sum()) + 1 if values_D[0] > 0 else 0
        if kept >= width:
            raise ValueError(
                f"variance {variance} takes {kept} of the features' {width} directions, which leaves none to be "
                f"anomalous in: choose a lower share, or a number up to {width - 1}"
            )
        return self._shift_D + mean_D, vectors_DD[:, :kept].clone(memory_format=torch.contiguous_format)


def outside(rows_ND: Tensor, mean_D: Tensor, basis_Dk: Tensor) -> Tensor:
    """The length of what lies outside the subspace, of rows [.., D]: [..]."""
    centred_ND = rows_ND - mean_D
    return (centred_ND - (centred_ND @ basis_Dk) @ basis_Dk.T).norm(dim=-1)
