"""The warnings that a run adds to those of its inspector: what its photographs as a whole tell."""

from __future__ import annotations

from collections.abc import Iterable

from downstream.calibration import percent
from downstream.exchangeability import Watch
from downstream.inspection.entry import Entry
from downstream.inspection.inspector import Inspector
from downstream.inspection.photos import printable
from downstream.inspection.results import ANOMALOUS, NORMAL
from downstream.inspection.tally import Tally, is_watched


def copies_note(copies: int, total: int) -> list[str]:
    """Return a warning about copies of normal photographs, which are compared with themselves."""
    if not copies:
        return []
    return [
        f"{copies} of {total} images are copies of normal photographs (under any name): their scores mean "
        "nothing, and they have no verdict."
    ]


def drift_note(inspector: Inspector, tally: Tally) -> list[str]:
    """Return a warning if there are more alarms than the promised rate allows for normal photographs."""
    calibration = inspector.calibration
    if calibration is None or inspector.options.threshold is not None:
        return []
    counts = tally.counts
    alarms, judged = counts[ANOMALOUS], counts[ANOMALOUS] + counts[NORMAL]
    if not judged or not calibration.exceeds(alarms, judged):
        return []
    return [
        f"{alarms} of {judged} images are anomalous: more than normal photographs like the given ones would give "
        f"(about {percent(calibration.rate)}; a test at the 1 % level). Either many of them have defects, or the line "
        "has changed since the normal photographs were taken. Look at the alarms; if they are good, add some of them "
        "to the normal photographs."
    ]


def change_note(watch: Watch | None, entries: Iterable[Entry]) -> list[str]:
    """Return the watch's warning in words; the two photographs that it names are looked up in ``entries``."""
    if watch is None or (change := watch.warning) is None:
        return []
    watched = enumerate(printable(entry.result.path) for entry in entries if is_watched(entry.result))
    since = next(path for number, path in watched if number == change.since)
    at = since if change.at == change.since else next(path for number, path in watched if number == change.at)
    return [change.in_words(since, at)]


def saturation_note(saturated: int, total: int, full_scale: float | None) -> list[str]:
    """Return a warning about values above the full scale."""
    if not saturated:
        return []
    limit = "the full scale of their type" if full_scale is None else f"{full_scale:g}, the full scale of the normals"
    return [f"{saturated} of {total} images hold values above {limit}: everything brighter looks white."]
