"""Settings for accelerators: matrix products in full precision, and copies that do not wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class _FullPrecision:
    """The process's setting, for as long as any thread needs it: the first one sets it, the last one restores it."""

    def __init__(self) -> None:
        self.lock, self.users = threading.Lock(), 0

    def enter(self) -> None:
        with self.lock:
            self.users += 1
            if self.users > 1:
                return
            # torch 2.9 replaced one setting by one for each backend, and refuses to read the old one where they differ.
            parts = [getattr(module, "matmul", None) for module in (torch.backends.cuda, torch.backends.mkldnn)]
            self.backends: list[Any] = [part for part in parts if hasattr(part, "fp32_precision")]
            self.before = [backend.fp32_precision for backend in self.backends]
            self.legacy = None if self.backends else torch.get_float32_matmul_precision()
            if self.legacy is not None:
                torch.set_float32_matmul_precision("highest")
            for backend in self.backends:
                backend.fp32_precision = "ieee"

    def leave(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users:
                return
            if self.legacy is not None:
                torch.set_float32_matmul_precision(self.legacy)
            for backend, setting in zip(self.backends, self.before, strict=True):
                backend.fp32_precision = setting


_FULL = _FullPrecision()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute matrix products in the tensors' own dtype (no TF32, bfloat16 or autocast), without gradients."""
    _FULL.enter()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        _FULL.leave()


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor from the host to ``device`` without waiting for the device's queued work.

    A copy from ordinary memory may wait, so a GPU copies from pinned memory, which torch reuses for the next copy.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
