"""A few numbers that tell one set of network weights from another, whatever their dtype and device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TENSORS = 8  # projected, evenly spaced over the network
TOLERANCE = 0.02  # rounding to bfloat16 moves a projection by about .002, other weights move it by about 1
GOLDEN = 0.6180339887498949


def fingerprint(network: nn.Module | None) -> list[float]:
    """Projections of some weight matrices on fixed signs, over their norms: about normal with deviation 1.

    Empty for a network without weights, or without values (on the meta device).
    """
    if network is None:
        return []
    matrices = [parameter for parameter in network.parameters() if parameter.ndim >= 2]
    if not matrices or any(matrix.is_meta for matrix in matrices):
        return []
    count = min(TENSORS, len(matrices))
    return [_projection(matrices[index * len(matrices) // count]) for index in range(count)]


def _projection(weight: Tensor) -> float:
    values = weight.detach().cpu().double().flatten()  # MPS has no float64
    places = torch.arange(len(values), dtype=torch.float64) * GOLDEN % 1
    return round(float(values[places < 0.5].sum() - values[places >= 0.5].sum()) / max(float(values.norm()), 1e-12), 5)


def same_weights(first: list[float], second: list[float]) -> bool:
    """Whether two fingerprints are of the same weights; an empty one, of unknown weights, agrees with any."""
    if not first or not second:
        return True
    pairs = zip(first, second, strict=False)
    return len(first) == len(second) and all(abs(a - b) <= TOLERANCE for a, b in pairs)
