"""Position embeddings of a vision transformer for another number of tokens than it was trained with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_positions(positions_PC: Tensor, grid: int, offset: float = 0.0, antialias: bool = False) -> Tensor:
    """[1 + M * M, C] (class token first) -> [1 + grid * grid, C] by bicubic interpolation in float32.

    Unchanged if M == grid. Families differ in how they were, or are usually, resized, and block features move by
    per cents with it: DINOv2 scales by (grid + 0.1) / M (``offset`` 0.1), which samples slightly other places than
    the plain grid / M of ImageBind; open_clip antialiases.

    Raises ValueError if the tokens do not make a square.
    """
    side = round(max(positions_PC.shape[0] - 1, 0) ** 0.5)
    if positions_PC.ndim != 2 or positions_PC.shape[0] != 1 + side * side:
        raise ValueError(
            f"position embeddings of shape {list(positions_PC.shape)} are not one class token and a square grid"
        )
    if side == grid:
        return positions_PC
    old = positions_PC[1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if offset:
        scale = (grid + offset) / side
        new = F.interpolate(old, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    else:
        new = F.interpolate(old, size=(grid, grid), mode="bicubic", align_corners=False, antialias=antialias)
    assert new.shape[2:] == (grid, grid)
    return torch.cat([positions_PC[:1], new[0].flatten(1).T.to(positions_PC.dtype)])
