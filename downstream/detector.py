"""What every detector gives: a score per image and a map per image.

Shapes: B images, S side of the network's input in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from typing_extensions import Self


@dataclass(frozen=True)
class Prediction:
    """``scores`` [B] and ``maps`` [B, S, S]; higher is more anomalous, in the detector's own unit."""

    scores: Tensor
    maps: Tensor


class Detector(Protocol):
    """Fits on normal images only, then scores and localises."""

    def fit(self, normal_batches: Iterable[Tensor]) -> Self: ...

    def predict(self, images: Tensor) -> Prediction: ...
