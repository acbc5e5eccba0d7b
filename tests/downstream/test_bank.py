"""The bank holds what was added, in order, once; the kernel's own counts of touched pages say so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adpretrain import memory
from adpretrain.memory import GrowingBank


@pytest.mark.parametrize("expected", [None, 70, 100])
def test_rows_come_back_in_order(expected: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where batches cross the borders of blocks (here of 16 rows)."""
    monkeypatch.setattr(memory, "BLOCK_BYTES", 16 * 5 * 4)
    rows = torch.randn(70, 5)
    bank = GrowingBank(expected)
    for part in rows.split(9):
        bank.add(part)
    assert bank.rows == 70
    assert torch.equal(bank.take(), rows)
    with pytest.raises(ValueError, match="empty memory bank"):
        bank.take()


def test_too_large_a_bank_is_refused_before_it_is_made() -> None:
    bank = GrowingBank(max_bytes=1000)
    bank.add(torch.zeros(40, 5))
    with pytest.raises(
        ValueError, match=r"bank of 60 patches x 5 channels needs 1.2 KiB, more than 1000 bytes: fit fewer"
    ):
        bank.add(torch.zeros(20, 5))
    with pytest.raises(ValueError, match="bank of 60 patches"):  # known beforehand: at once
        GrowingBank(expected=60, max_bytes=1000).add(torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"needs 1.6 KiB"):
        GrowingBank(max_bytes=1000, beside=20).add(torch.zeros(40, 5))
    # By default half of the memory: a petabyte is refused without being asked of the system.
    with pytest.raises(ValueError, match="raise max_bank_bytes"):
        GrowingBank(expected=1 << 40).add(torch.zeros(1, 256))


PEAK = """
import torch
from adpretrain.memory import GrowingBank
def status(field):
    return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1])
rows, width, batches = 4000, 1024, 25
GrowingBank().add(torch.randn(10, width))
batch = torch.empty(rows, width)
for expected in (rows * batches, None):
    bank = GrowingBank(expected)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    for number in range(batches):
        bank.add(batch.fill_(number))
    result = bank.take()
    assert result[::rows, 0].tolist() == list(range(batches))
    print((status("VmHWM") - before) / (4 * rows * width / 1024))
    del result, bank
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
def test_the_peak_is_the_bank_and_a_batch() -> None:
    """25 batches of 16 MB, one at a time: 26 at the peak if the number of images is known; else a block of four more,
    not the 51 of a concatenation."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, cwd=root, env=environment
    )
    known, unknown = map(float, done.stdout.split())
    assert 24.5 < known < 26.5
    assert 24.5 < unknown < 31
