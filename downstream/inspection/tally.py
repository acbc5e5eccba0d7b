"""What a run counts while its entries pass by once: memory does not hold the results of millions of photographs.

40 bytes a photograph stay in memory: its score for the histogram, and score and unlike value, twice, for the watch.
Whole entries are held of the `LISTED` most unusual photographs only, which the report and summary.json list.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import replace
from heapq import heappush, heapreplace

import numpy as np

from downstream.calibration import Calibration
from downstream.exchangeability import Watch
from downstream.inspection.entry import Entry
from downstream.inspection.results import ANOMALOUS, NORMAL, UNDECIDED, UNREADABLE, VERDICTS, Result, oddness
from downstream.visualise import MOST_BOXES

LISTED = 10_000
SEVERITY = {verdict: place for place, verdict in enumerate((ANOMALOUS, UNDECIDED, UNREADABLE, NORMAL))}
Unusual = tuple[float, ...]


class Tally:
    """Counts of entries, which `add` takes in the order of their names, and the ``most`` most unusual of them.

    ``calibration`` is that of the inspector: with it, a `Watch` tests whether the photographs look like the normals.
    """

    def __init__(self, calibration: Calibration | None = None, most: int = LISTED) -> None:
        self.verdicts = Counter[str]()
        self.scores = {verdict: array("d") for verdict in (NORMAL, UNDECIDED, ANOMALOUS)}
        self.regions = self.with_regions = self.quiet = self.copies = self.odd_shapes = self.saturated = 0
        self.watch = None if calibration is None else watch_of(calibration)
        self._both = calibration is not None and bool(calibration.unlike)
        self.most = most
        self._seen, self._read, self._inspected = 0, 0, 0.0
        self._heap: list[tuple[Unusual, int, Entry]] = []  # the least unusual first

    def add(self, entry: Entry) -> None:
        """Count one more photograph."""
        result = entry.result
        self.verdicts[result.verdict] += 1
        if result.score is not None and result.verdict in self.scores:
            self.scores[result.verdict].append(result.score)
        self.regions += result.regions or 0
        self.with_regions += bool(result.regions)
        self.quiet += result.is_quiet
        self.copies += result.verdict == UNDECIDED and bool(result.reason)
        self.odd_shapes += entry.odd_shape
        self.saturated += entry.saturated
        self._read += entry.size is not None
        self._inspected += entry.inspected
        if self.watch is not None and is_watched(result):
            numbers = (result.score, result.unlike) if self._both else (result.score,)
            self.watch.update(np.array([numbers], dtype=np.float64))
        self._list(entry)
        self._seen += 1

    def _list(self, entry: Entry) -> None:
        result = entry.result
        unusual = (-SEVERITY[result.verdict], *(-number for number in oddness(result)))
        full = len(self._heap) == self.most
        if full and (unusual, -self._seen) < self._heap[0][:2]:
            return
        shown = tuple(replace(finding, counts=()) for finding in entry.findings[:MOST_BOXES])
        item = unusual, -self._seen, replace(entry, findings=shown)
        if full:
            heapreplace(self._heap, item)
        else:
            heappush(self._heap, item)

    def __len__(self) -> int:
        """The number of photographs."""
        return self._seen

    @property
    def listed(self) -> list[Entry]:
        """The most unusual entries (all, if there are not more), in the order of their names, with their first regions
        without masks."""
        return [entry for _, _, entry in sorted(self._heap, key=lambda item: -item[1])]

    @property
    def left_out(self) -> int:
        """The number of photographs that are not `listed`."""
        return self._seen - len(self._heap)

    @property
    def counts(self) -> dict[str, int]:
        """Verdict -> number of photographs."""
        return {verdict: self.verdicts[verdict] for verdict in VERDICTS}

    @property
    def inspected(self) -> float | None:
        """The share of a photograph that is inspected, on average; None if none could be read."""
        return self._inspected / self._read if self._read else None


def is_watched(result: Result) -> bool:
    """Whether a photograph counts in the watch: it was compared with the normals."""
    return result.verdict in (ANOMALOUS, NORMAL)


def watch_of(calibration: Calibration) -> Watch:
    """Begin to test whether photographs, in the order in which they come, look like the normals."""
    if not calibration.unlike:
        return Watch(calibration.scores)
    both = list(zip(calibration.scores, calibration.unlike, strict=True))
    return Watch(both, measures=("score", "unlike value"))
