"""Images turned about their centre, so that a few normal photographs show a product in any position.

AnomalyDINO and SubspaceAD turn photographs before they are prepared; here the prepared, square images are turned, which
is the same but for what a crop leaves out. What comes into the picture at the corners is its mirror image at the
border, as in AnomalyDINO's code, because a flat colour would be learnt as a normal patch.

Shapes: B images, S side in pixels, C channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def check_rotations(rotations: int) -> None:
    """Raise ValueError unless there is at least one rotation."""
    if rotations < 1:
        raise ValueError(f"rotations {rotations} must be at least 1, which leaves the photographs as they are")


def turned(images_BCSS: Tensor, turn: float) -> Tensor:
    """Turn images counter-clockwise by ``turn`` of a full turn, in 0..1: [B, C, S, S].

    Quarter turns are exact; others are interpolated bilinearly, and mirrored at the centres of the border's pixels.
    """
    quarters, rest = divmod(4 * turn, 1)
    images_BCSS = torch.rot90(images_BCSS, int(quarters), (2, 3)) if quarters else images_BCSS
    if not rest:
        return images_BCSS
    angle = rest * math.pi / 2
    cosine, sine = math.cos(angle), math.sin(angle)
    matrix_23 = images_BCSS.new_tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]])
    grid_BSS2 = F.affine_grid(matrix_23.expand(len(images_BCSS), 2, 3), list(images_BCSS.shape), align_corners=True)
    return F.grid_sample(images_BCSS, grid_BSS2, "bilinear", "reflection", align_corners=True)
