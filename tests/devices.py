"""A device that tests run on, and what its results are compared with."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Device:
    """``place``: what to move things to. ``syncs``, ``uploads``, ``launches``: counted so far; None on a GPU."""

    place: torch.device
    syncs: Counter[str] | None = None
    uploads: Counter[str] | None = None
    launches: Counter[str] | None = None

    @property
    def pretended(self) -> bool:
        return self.syncs is not None

    def equal(self, found: Any, expected: Any, rtol: float = 0.0, atol: float = 0.0, gpu: float = 1e-3) -> None:
        """Tensors of the device against the CPU's: to the last bit, or the tolerance given; a GPU adds in other orders,
        so there relative to the largest value, ``gpu``."""
        pairs = list(zip(_tensors(found), _tensors(expected), strict=True))
        assert pairs
        for ours, theirs in pairs:
            assert ours.device.type == self.place.type, f"a result is on {ours.device}"
            assert theirs.device.type == "cpu"
            if not self.pretended and theirs.is_floating_point():
                torch.testing.assert_close(ours.cpu(), theirs, rtol=gpu, atol=gpu * float(theirs.abs().max()))
            else:
                torch.testing.assert_close(ours.cpu(), theirs, rtol=rtol, atol=atol, equal_nan=True)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
