"""What a training step's time is spent on, and how much of the device's arithmetic is used (MFU).

MFU: FLOPs that the step cannot do without (backbone forwards, projector forward and backward) over what the device
could do in that time. Matching and losses do not count as useful.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

# Dense TFLOP/s by the makers' data sheets: bf16/fp16, and float32 as torch runs it by default (no TF32). The first name
# that a device's name contains counts.
PEAKS = {
    "H200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "A10": (125, 31.2),
    "L4": (121, 30.3),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
    "V100": (125, 15.7),
    "T4": (65, 8.1),
}


def peak_flops(name: str, half: bool) -> float | None:
    """FLOP/s that a device of this name can do at most in half precision or float32; None if it is not in the table."""
    found = next((peaks for known, peaks in PEAKS.items() if known in name), None)
    return None if found is None else 1e12 * (found[0] if half else found[1])


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs of the matrix products and convolutions in ``work``, a multiply-add being two; backward passes included."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


class Stopwatch:
    """Seconds per phase: ``watch("matching")`` ends the phase before and begins this one.

    On a CUDA device the marks are events in the stream of work, read only when `seconds` is called: marking does not
    wait for the device, and a phase is as long as the device took, idling included.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_device = device.type == "cuda" and torch.cuda.is_available()
        self._marks: list[tuple[str, Any]] = [("other", self._now())]

    def _now(self) -> Any:
        if not self.on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __call__(self, phase: str) -> None:
        self._marks.append((phase, self._now()))

    def seconds(self) -> dict[str, float]:
        """Per phase since the last call; waits for the device."""
        self._marks.append((self._marks[-1][0], self._now()))
        if self.on_device:
            torch.cuda.synchronize()
        spent: dict[str, float] = defaultdict(float)
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            spent[phase] += begin.elapsed_time(end) / 1e3 if self.on_device else end - begin
        self._marks = self._marks[-1:]
        return dict(spent)


class Throughput:
    """Images per second, shares of the phases and MFU, since the last line and since the start.

    ``peak``: FLOP/s of all devices together; None = unknown, and MFU is left out. ``watch`` is told the phases.
    """

    def __init__(self, watch: Stopwatch, peak: float | None) -> None:
        self.watch, self.peak = watch, peak
        self.images = self.flops = 0.0
        self.total: dict[str, float] = defaultdict(float)
        self.total_images = self.total_flops = 0.0

    def add(self, images: int, flops: float) -> None:
        """Count a step."""
        self.images += images
        self.flops += flops

    def line(self) -> dict[str, float]:
        """``images_per_s``, ``time_<phase>`` (shares of 1) and ``mfu`` of the steps since the last line."""
        spent = self.watch.seconds()
        for phase, seconds in spent.items():
            self.total[phase] += seconds
        self.total_images += self.images
        self.total_flops += self.flops
        line = self._line(spent, self.images, self.flops)
        self.images = self.flops = 0.0
        return line

    def _line(self, spent: dict[str, float], images: float, flops: float) -> dict[str, float]:
        elapsed = sum(spent.values())
        line = {"images_per_s": images / elapsed}
        line |= {f"time_{phase}": seconds / elapsed for phase, seconds in spent.items()}
        return line if self.peak is None else {**line, "mfu": flops / elapsed / self.peak}

    def summary(self) -> str:
        """One readable line about all the steps."""
        line = self._line(self.total, self.total_images, self.total_flops)
        shares = sorted(((value, key.removeprefix("time_")) for key, value in line.items() if "time_" in key))[::-1]
        parts = ", ".join(f"{phase} {100 * share:.0f} %" for share, phase in shares)
        mfu = f"; MFU {100 * line['mfu']:.0f} %" if "mfu" in line else ""
        return f"{self.total_images:.0f} images, {line['images_per_s']:.3g} images/s; time in {parts}{mfu}"
