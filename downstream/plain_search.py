"""The search of `downstream.neighbours` in a few plain operations, which torch.export turns into a graph.

There are no loops over blocks, no checks and no faiss; all similarities are in memory at once. The rows come from one
matrix product, so that rounding may choose between rows that are nearly equally near; their distances are then computed
from differences, as precisely as in `Neighbours`.

Shapes: Q queries and N rows of D channels, k neighbours; leading dimensions, if any, are those of a batch.
"""

from __future__ import annotations

from torch import Tensor


class PlainNeighbours:
    """A bank [N, D] for exact searches in a graph: its methods are those of `Neighbours`, without their checks."""

    def __init__(self, bank_ND: Tensor) -> None:
        self.bank_ND = constant(bank_ND)
        self._centre_D, self._offset_N = _prepared(self.bank_ND)

    def search(self, query_QD: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """Return distances to the k nearest rows, ascending, and their indices: [Q, k], [Q, k] int64."""
        return _search(query_QD, self.bank_ND, self._centre_D, self._offset_N, k)


def plain_nearest(query_QD: Tensor, bank_ND: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Return what `neighbours.nearest` gives, for every query set [.., Q, D] in a bank of its own [.., N, D]."""
    return _search(query_QD, bank_ND, *_prepared(bank_ND), k)


def constant(tensor: Tensor) -> Tensor:
    """Copy a fitted tensor for a graph, of which a tensor made in inference mode cannot be part."""
    return tensor.detach().clone().contiguous()


def _prepared(bank_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean m of the rows, and -||b - m||^2 / 2 of every row b: [.., D] and [.., N]."""
    centre_D = bank_ND.mean(-2)
    return centre_D, -0.5 * (bank_ND - centre_D[..., None, :]).square().sum(-1)


def _search(query_QD: Tensor, bank_ND: Tensor, centre_D: Tensor, offset_N: Tensor, k: int) -> tuple[Tensor, Tensor]:
    # (q - m).b - ||b - m||^2 / 2 is -||q - b||^2 / 2 up to a term of the query alone. Without m it would cancel more;
    # with b - m instead of b a graph would hold the bank twice.
    similarity_QN = (query_QD - centre_D[..., None, :]) @ bank_ND.mT + offset_N[..., None, :]
    # A maximum is faster than a selection.
    index_Qk = similarity_QN.argmax(-1, keepdim=True) if k == 1 else similarity_QN.topk(k).indices
    if bank_ND.ndim == 2:
        found_QkD = bank_ND[index_Qk]
    else:
        rows = index_Qk.flatten(-2)[..., None].expand(*index_Qk.shape[:-2], -1, bank_ND.shape[-1])
        found_QkD = bank_ND.gather(-2, rows).unflatten(-2, index_Qk.shape[-2:])
    return (query_QD[..., None, :] - found_QkD).square().sum(-1).sqrt(), index_Qk
