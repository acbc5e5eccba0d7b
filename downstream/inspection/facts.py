"""What the report says about a run: a few sentences for whoever leads the shift, then the facts behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from downstream.calibration import Calibration, percent
from downstream.inspection.inspector import Inspector
from downstream.inspection.normals import outlier_note
from downstream.inspection.photos import printable
from downstream.inspection.report import Fact
from downstream.inspection.results import ANOMALOUS, NORMAL, UNDECIDED, UNREADABLE, Result, oddness

NAMED = 3  # worst photographs that are named


def in_brief(
    inspector: Inspector, counts: Mapping[str, int], results: Sequence[Result], many: bool, changed: bool
) -> str:
    """Say in a few plain sentences what was found, whether the promise holds, and what to do next.

    counts: verdict -> number of photographs. results: those among which the worst are named. many: there are more
    alarms than promised. changed: since some photograph they no longer look like the normal ones.
    """
    bad = [result for result in results if result.verdict == ANOMALOUS]
    named = bad or [result for result in results if result.verdict == UNDECIDED and inspector.threshold is None]
    quiet = [result for result in results if result.is_quiet]
    if not counts[ANOMALOUS] + counts[NORMAL] + len(named):
        return "No photograph could be judged: the reason stands on each card."
    judged = counts[ANOMALOUS] + counts[NORMAL]
    found = _found(counts[ANOMALOUS], judged, named, inspector.threshold is not None)
    doubtful = bool(inspector.calibration and outlier_note(inspector.normals, inspector.calibration))
    steps = _next(counts, many or changed, [] if bad else quiet, doubtful)
    return " ".join([found, _promise(inspector, judged, many, changed), *steps])


def _found(bad: int, judged: int, named: Sequence[Result], verdicts: bool) -> str:
    names = _names(named)
    if not verdicts:
        return f"The photographs are only ranked; {names} look{'s' if len(named) == 1 else ''} most unusual."
    if not bad:
        everything = "Both" if judged == 2 else f"All {judged}"
        return "The photograph looks good." if judged == 1 else f"{everything} photographs look good."
    some = (
        f"{bad} of {judged} photographs look{'s' if bad == 1 else ''} bad" if judged > 1 else "The photograph looks bad"
    )
    return f"{some}: {names}." if bad <= NAMED else f"{some}, and {names} look worst."


def _names(results: Sequence[Result]) -> str:
    """The names of the most unusual of them: "a", "a and b" or "a, b and c"."""
    *others, last = [printable(one.path) for one in sorted(results, key=oddness)[:NAMED]] or [""]
    return f"{', '.join(others)} and {last}" if others else last


def _promise(inspector: Inspector, judged: int, many: bool, changed: bool) -> str:
    calibration, options = inspector.calibration, inspector.options
    if options.threshold is not None:
        return "The threshold was chosen by hand, so that no rate of false alarms is promised."
    if calibration is None:
        return "One normal photograph promises nothing: add at least one more."
    rate = percent(calibration.rate)
    if changed:
        return (
            "The photographs have changed on the way (in the order of their names, which is taken for time), so that "
            f"the promise of at most {rate} false alarms has ended."
        )
    if many:
        return f"That is more than {rate} false alarms explain: many are defective, or the line has changed."
    text = f"Nothing speaks against the promise that at most {rate} of good photographs look bad"
    expected = round(calibration.rate * judged)
    text += f" (about {expected} of {judged})" if expected else ""
    return f"{text}."


def _next(counts: Mapping[str, int], drift: bool, quiet: Sequence[Result], doubtful: bool) -> list[str]:
    steps = []
    if drift:
        steps.append(
            "Look at the line and at the photographs that look bad: if they are good, add some to the normal ones."
        )
    elif counts[ANOMALOUS]:
        steps.append("Look at their heatmaps, the worst first; what turns out to be good can join the normal ones.")
    elif quiet:
        steps.append(f"Look at {_names(quiet)} all the same: a small place there is unlike the normal photographs.")
    if doubtful:
        steps.append("Look at the normal photograph that alone sets the threshold, which the notes name.")
    if counts[UNREADABLE]:
        some = "One photograph" if counts[UNREADABLE] == 1 else f"{counts[UNREADABLE]} photographs"
        steps.append(f"{some} could not be read and should be taken again.")
    return steps or (["Nothing has to be done."] if counts[NORMAL] else [])


def regions_note(results: Sequence[Result], found: int, promised: bool) -> list[str]:
    """Return a note if ``found`` photographs that are normal have regions above the pixel limit, and name the most
    unusual of those in ``results``; ``promised``: the threshold of the score keeps a rate."""
    if not found:
        return []
    names = _names([result for result in results if result.is_quiet])
    names = f", {'such as ' if found > NAMED else ''}{names}," if names else ""
    their = "its" if found == 1 else "their"
    have = f"photograph{names} has" if found == 1 else f"photographs{names} have"
    note = f"{found} {have} a region above the limit for map values although {their} score is not above the threshold"
    if promised:
        note += ": each of the two limits keeps the promised rate by itself, both together at most twice that"
    return [f"{note}; look at {'it' if found == 1 else 'them'}."]


def facts_of(inspector: Inspector, counts: Mapping[str, int], regions: int, inspected: float | None) -> list[Fact]:
    """The facts of a run: ``counts`` of the verdicts, the number of regions, and the share of a photograph that is
    inspected, on average, if any was."""
    calibration, options = inspector.calibration, inspector.options
    threshold = "none" if inspector.threshold is None else f"{inspector.threshold:.4g}"
    origin = "given by the user" if options.threshold is not None else "from normal photographs only"
    # This explains why a heatmap can have outlines although the verdict is normal.
    origin += f"; a score is {inspector.score_is}"
    beyond = calibration.unlike_threshold if calibration else math.inf
    limit = f"above {beyond:.3g}" if math.isfinite(beyond) else "not judged"
    calibrated = len(calibration.scores) if calibration else 0
    verdicts = ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n)
    used = f"as references; {calibrated} calibrate the threshold" if inspector.references else "calibrate the threshold"
    return [
        Fact("Images", str(sum(counts.values())), verdicts),
        Fact("Threshold", threshold, origin if inspector.threshold is not None else "one reference cannot give one"),
        Fact("Unlike the normals", limit, "brightness, contrast, colour, sharpness, layout; in units of their spread"),
        _rate_fact(calibration if options.threshold is None else None, options.false_alarm_rate),
        _region_fact(inspector, regions),
        *_inspected_fact(inspected),
        Fact(
            "Detail",
            "{:.0f} x {:.0f} px".format(*inspector.cell),
            "of a photograph in one cell of the finest features; much smaller marks are not seen",
        ),
        Fact("Normal photographs", str(inspector.references or calibrated), used),
    ]


def _inspected_fact(inspected: float | None) -> list[Fact]:
    if inspected is None or inspected == 1:
        return []
    note = "of a photograph is inspected, on average; outside it nothing is scored, matched or calibrated"
    return [Fact("Region of interest", percent(inspected), note)]


def _region_fact(inspector: Inspector, count: int) -> Fact:
    limit = inspector.pixel_limit
    if limit is None:
        return Fact("Regions", "none", "one normal photograph gives no limit for map values")
    rate = percent(inspector.calibration.rate if inspector.calibration else inspector.options.false_alarm_rate)
    note = f"where the map exceeds {limit:.4g}, as in {rate} of normal photographs at most; listed in regions.csv"
    return Fact("Regions", str(count), note)


def _rate_fact(calibration: Calibration | None, asked: float) -> Fact:
    if calibration is None:
        return Fact("False-alarm rate", "not known", "no calibrated threshold")
    note = f"on average; for these photographs up to {percent(calibration.rate_upper)} (95 % confidence)"
    if calibration.rate > asked + 1e-9:
        note = f"{percent(asked)} was asked; {note}"
    return Fact("Promised false-alarm rate", percent(calibration.rate), note)
