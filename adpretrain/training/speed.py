"""Time per phase of a training step, and the share of the device's arithmetic that is used (MFU).

MFU: necessary FLOPs of a step (backbone forwards, projector forward and backward), divided by what the device could do
in that time. Matching and losses do not count.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

# Dense TFLOP/s as the makers state them, not measured: bf16/fp16, and float32 as torch runs it by default (no TF32).
# The first key that is a word of the device's name counts: an L40 is not an L4, nor an A10G an A10.
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


def peak_flops(device: torch.device, half: bool) -> float | None:
    """The peak FLOP/s of a device in half precision or float32; None if it is not in the table."""
    if not _is_gpu(device):
        return None
    return peak_of(torch.cuda.get_device_name(device), half)


def peak_of(name: str, half: bool) -> float | None:
    """`peak_flops` of a device's name, such as "NVIDIA A100-SXM4-80GB"."""
    found = next((peaks for known, peaks in PEAKS.items() if re.search(rf"\b{known}\b", name)), None)
    return None if found is None else 1e12 * (found[0] if half else found[1])


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available()


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs of the matrix products and convolutions in ``work`` (two per multiply-add), backward passes included."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


class Stopwatch:
    """Seconds per phase: ``watch("matching")`` ends the phase before and begins this one.

    On a CUDA device the marks are events in the stream of work, read only when `seconds` is called: marking does not
    wait for the device, and a phase is as long as the device took, idling included.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_device = _is_gpu(device)
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
        """Seconds per phase since the last call; waits for the device."""
        self._marks.append((self._marks[-1][0], self._now()))
        if self.on_device:
            torch.cuda.synchronize()
        spent: dict[str, float] = defaultdict(float)
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            spent[phase] += begin.elapsed_time(end) / 1e3 if self.on_device else end - begin
        self._marks = self._marks[-1:]
        return dict(spent)


class Throughput:
    """Images per second, time shares of the phases and MFU, since the last line and since the start.

    ``watch`` measures the phases; ``peak``: FLOP/s of this process's device; None = unknown, which leaves MFU out.
    """

    def __init__(self, watch: Stopwatch, peak: float | None = None) -> None:
        self.watch, self.peak = watch, peak
        self.per_image = self.per_step = 0
        self.restart()

    def restart(self) -> None:
        """Reset all counts and times."""
        self.watch.seconds()
        self._part, self._whole = defaultdict[str, float](float), defaultdict[str, float](float)

    def count(self, backbone: Callable[[], object], projector: Callable[[], object]) -> None:
        """Count the FLOPs of the backbone's forward of one image, and of the projector's forward and backward (twice
        the forward) in a step, by running both, unless the peak is unknown."""
        if self.peak is not None:
            self.per_image, self.per_step = count_flops(backbone), 3 * count_flops(projector)

    def add(self, images: int, encoded: int) -> None:
        """Add a step of ``images`` images in all processes, of which this process's backbone encoded ``encoded``."""
        self._part["images"] += images
        self._part["flops"] += encoded * self.per_image + self.per_step

    def line(self) -> dict[str, float]:
        """``images_per_s``, ``time_<phase>`` (shares of 1) and ``mfu`` of the steps since the last line."""
        self._part.update({f"time_{phase}": seconds for phase, seconds in self.watch.seconds().items()})
        for key, value in self._part.items():
            self._whole[key] += value
        line = self._rates(self._part)
        self._part.clear()
        return line

    def _rates(self, sums: Mapping[str, float]) -> dict[str, float]:
        phases = {key: value for key, value in sums.items() if key.startswith("time_")}
        elapsed = sum(phases.values())
        rates = {"images_per_s": sums["images"] / elapsed, **{key: value / elapsed for key, value in phases.items()}}
        return rates if self.peak is None else {**rates, "mfu": sums["flops"] / elapsed / self.peak}

    def overall(self) -> dict[str, float]:
        """The same rates as in `line`, over all lines since the start."""
        return self._rates(self._whole)

    def summary(self) -> str:
        """A sentence with the overall rates, for the console."""
        rates = self.overall()
        shares = sorted((-value, key.removeprefix("time_")) for key, value in rates.items() if key.startswith("time_"))
        parts = ", ".join(f"{phase} {-100 * share:.0f} %" for share, phase in shares)
        mfu = f"; MFU {100 * rates['mfu']:.0f} %" if "mfu" in rates else ""
        if self.watch.on_device and not mfu:
            mfu = "; MFU unknown (the device is not in the table of peaks)"
        return f"{rates['images_per_s']:.3g} images/s; time: {parts}{mfu}"
