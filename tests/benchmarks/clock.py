"""What a benchmark costs: CPU time and memory of this process."""

from __future__ import annotations

import time
from collections.abc import Callable


def cpu_seconds(function: Callable[[], object], repeats: int) -> float:
    """The least CPU time of ``repeats`` calls; time spent waiting for other processes does not count."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best


def interleaved_cpu_seconds(
    functions: dict[str, Callable[[], object]], repeats: int, of: Callable[[list[float]], float] = min
) -> dict[str, float]:
    """The least CPU time of each function; taken in turns, so that a busy spell of the machine meets them all.
    ``of`` takes another statistic of the ``repeats`` times than the least."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.process_time()
            function()
            taken[name].append(time.process_time() - start)
    return {name: of(times) for name, times in taken.items()}


def resident_kib(field: str) -> int:
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(field)).split()[1])
