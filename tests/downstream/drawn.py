"""Noise as photographs, for detectors on the raw backbone Lite0 (fixture `backbone`)."""

from __future__ import annotations

import torch
from torch import Tensor

SIZE = 64


def photographs(count: int, seed: int) -> Tensor:
    """[count, 3, S, S], the same for the same seed."""
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
