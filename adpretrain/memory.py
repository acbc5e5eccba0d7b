"""Limits on the memory of a fitted detector, checked before it is allocated, and a bank that is never held twice.

A bank that outgrows the machine raises no error: the machine swaps, or the process is killed without a message, after
hours of extraction. Detectors check here first, and report what they will hold, or what to change.

Shapes: N rows of D channels.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
SHARE = 0.5  # of the machine's memory, if no limit is given
CGROUP = Path("/sys/fs/cgroup/memory.max")  # what a container may use
BLOCK_BYTES = 64 << 20  # large enough that C libraries return it to the system when it is freed
ADVICE = (
    "fit fewer images, keep a share of every image's patches, set embedding.target_dim, a larger embedding.stride or "
    "fewer levels, or raise max_bank_bytes"
)


def hold(what: str, needed: int, limit: int, advice: str, say: bool = True) -> None:
    """Log that ``what`` will hold ``needed`` bytes, if ``say``.

    Raises ValueError with the ``advice`` if that is more than ``limit``.
    """
    if needed > limit:
        raise ValueError(f"{what} needs {readable(needed)}, more than {readable(limit)}: {advice}")
    if say:
        logger.info("%s will hold about %s of %s", what, readable(needed), readable(limit))


def memory_limit(device: torch.device, given: int | None = None) -> int:
    """Bytes that a bank on this device may take: ``given``, or half of the device's memory."""
    return given if given is not None else int(SHARE * total_memory(device))


def total_memory(device: torch.device) -> int:
    """Memory of a device in bytes, or of the container if its limit is lower."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit ("max")
        total = min(total, int(CGROUP.read_text()))
    return total


def readable(size: int) -> str:
    """A number of bytes as text, such as "1.5 GiB"."""
    for unit, width in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << width:
            return f"{size / (1 << width):.1f} {unit}"
    return f"{size} bytes"


class GrowingBank:
    """Rows [n, D] are added batch by batch, then taken as one matrix.

    torch.cat of all batches would need their memory twice. If the number of rows is known, the bank is one allocation
    that is filled; if not, batches fill blocks that are freed one by one while they are joined. A bank that would
    exceed the limit is refused before it is allocated.

    ``expected``: at least the number of rows, if it is known. ``max_bytes``: None = half of the memory. ``beside``:
    bytes per row that the next use of the bank will need besides the row itself. ``say``: whether to log the size.
    """

    def __init__(
        self, expected: int | None = None, max_bytes: int | None = None, beside: int = 0, say: bool = True
    ) -> None:
        self.expected, self.max_bytes, self.beside, self.say = expected, max_bytes, beside, say
        self.rows = 0
        self._blocks: list[Tensor] = []
        self._free = 0  # rows that still fit into the last block

    def add(self, rows_ND: Tensor) -> None:
        """Take in rows. Raises ValueError, before memory is taken, if the bank becomes too large."""
        width = rows_ND.shape[1]
        rows = max(self.rows + len(rows_ND), self.expected or 0)
        self._hold(rows, rows_ND, say=self.expected is not None and not self.rows)
        done = 0
        while done < len(rows_ND):
            if not self._free:
                per_block = max(1, BLOCK_BYTES // (width * rows_ND.element_size()))
                size = self.expected if self.expected and not self._blocks else per_block
                self._blocks.append(rows_ND.new_empty(size, width))
                self._free = size
            taken = min(self._free, len(rows_ND) - done)
            start = len(self._blocks[-1]) - self._free
            self._blocks[-1][start : start + taken] = rows_ND[done : done + taken]
            self._free -= taken
            done += taken
        self.rows += len(rows_ND)

    def _hold(self, rows: int, like_ND: Tensor, say: bool) -> None:
        needed = rows * (like_ND.shape[1] * like_ND.element_size() + self.beside)
        what = f"a memory bank of {rows} patches x {like_ND.shape[1]} channels"
        hold(what, needed, memory_limit(like_ND.device, self.max_bytes), ADVICE, say and self.say)

    def take(self) -> Tensor:
        """All rows as one matrix [N, D]; the bank is empty afterwards. Raises ValueError if it has no rows."""
        if not self.rows:
            raise ValueError("an empty memory bank: no normal images were given")
        blocks, rows = self._blocks, self.rows
        self._hold(rows, blocks[0], say=self.expected is None)
        self._blocks, self.rows, self._free = [], 0, 0
        if len(blocks) == 1:
            return blocks[0][:rows]
        bank_ND = blocks[0].new_empty(rows, blocks[0].shape[1])
        done = 0
        for number, block in enumerate(blocks):
            taken = min(len(block), rows - done)
            bank_ND[done : done + taken] = block[:taken]
            done += taken
            blocks[number] = block = torch.empty(0)  # frees it
        return bank_ND
