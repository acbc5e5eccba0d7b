"""How much memory a fitted detector may take, asked before it is taken.

A bank that outgrows the machine does not fail: the machine swaps, or the process is killed without a word, after
hours of extraction. Detectors ask here first, and say what they will hold, or what to change.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import torch

logger = logging.getLogger(__name__)
SHARE = 0.5  # of the machine's memory, where no limit is given
CGROUP = Path("/sys/fs/cgroup/memory.max")  # what a container may use


def hold(what: str, needed: int, limit: int, advice: str, say: bool = True) -> None:
    """Tell the logger of this module that ``what`` will hold ``needed`` bytes, if ``say``.

    Raises ValueError with the ``advice`` if that is more than ``limit``.
    """
    if needed > limit:
        raise ValueError(f"{what} needs {readable(needed)}, more than {readable(limit)}: {advice}")
    if say:
        logger.info("%s will hold about %s of %s", what, readable(needed), readable(limit))


def memory_limit(device: torch.device, given: int | None = None) -> int:
    """Bytes that a bank on this device may take: ``given``, or half of what there is."""
    return given if given is not None else int(SHARE * total_memory(device))


def total_memory(device: torch.device) -> int:
    """Bytes of a device, or of the container if it may use less of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit ("max")
        total = min(total, int(CGROUP.read_text()))
    return total


def readable(size: int) -> str:
    """A number of bytes for people."""
    for unit, width in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << width:
            return f"{size / (1 << width):.1f} {unit}"
    return f"{size} bytes"
