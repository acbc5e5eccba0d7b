"""The tables of a board: for each task (a protocol and its setting) the ranking of features, over data sets and
detectors, and that of every pair of features and detector, over data sets.

Only what was measured on every data set of a task is ranked; the rest is listed with what is missing.
"""

from __future__ import annotations

import fnmatch
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from downstream.board.ranking import Standing, Unit, standings
from downstream.board.result import Product, Result

METRICS = ("image_auroc", "pixel_auroc", "aupro")
ALLOWED = ("yes", "with conditions")


@dataclass(frozen=True)
class Filters:
    """Which results a board shows; ranks and tests are computed among these only.

    Args:
        tasks: tasks, or patterns such as "few-shot*"; by default all
        sets: names of data sets, or patterns; by default all
        detectors: names of detectors, or patterns; by default all
        commercial: only features whose chain of licences allows a product, perhaps with conditions
        most_ms: only what scores a photograph in at most this many milliseconds, where it was measured
        most_parameters: only features of networks with at most this many million parameters
    """

    tasks: list[str] = field(default_factory=list)
    sets: list[str] = field(default_factory=list)
    detectors: list[str] = field(default_factory=list)
    commercial: bool = False
    most_ms: float | None = None
    most_parameters: float | None = None

    def keep(self, result: Result) -> bool:
        """Say whether a result is shown."""
        milliseconds = None if result.latency is None else 1000 * result.latency
        return (
            _fits(self.tasks, result.task)
            and _fits(self.sets, result.data.name)
            and _fits(self.detectors, result.detector.name)
            and (not self.commercial or result.extractor.product in ALLOWED)
            and (self.most_ms is None or (milliseconds is not None and milliseconds <= self.most_ms))
            and (self.most_parameters is None or result.extractor.parameters <= 1e6 * self.most_parameters)
        )


def _fits(patterns: Sequence[str], name: str) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Line:
    """A line of a table: features, perhaps with a ``detector`` (None = all of them), and their results for the units
    that are ranked. ``standing`` is None if results are missing, which ``missing`` names."""

    features: str
    detector: str | None
    results: Mapping[Unit, Result]
    standing: Standing | None
    missing: tuple[Unit, ...] = ()

    def mean(self, metric: str) -> float | None:
        """A metric's mean over the units, in per cent; None if one is missing or does not define it."""
        values = [self._value(result, metric) for result in self.results.values()]
        return None if self.missing or None in values else 100 * float(np.mean(np.array(values, float)))

    def defined(self, metric: str) -> list[float]:
        """The values of the units that define a metric, in per cent."""
        values = [self._value(result, metric) for result in self.results.values()]
        return [100 * value for value in values if value is not None]

    def spread(self, metric: str) -> float | None:
        """The standard deviation of the mean between draws, in points; None if there is one draw, or if results have
        different numbers of draws."""
        rows = [result.metrics[metric].repeats for result in self.results.values() if metric in result.metrics]
        if len({len(row) for row in rows}) != 1 or len(rows[0]) < 2 or any(None in row for row in rows):
            return None
        return 100 * float(np.std(np.mean(np.array(rows, float), axis=0), ddof=1))

    def of_set(self, name: str) -> float | None:
        """The image AUROC on a data set, in per cent, over detectors."""
        found = [self._value(result, METRICS[0]) for unit, result in self.results.items() if unit[0] == name]
        known = [value for value in found if value is not None]
        return 100 * float(np.mean(known)) if known else None

    @staticmethod
    def _value(result: Result, metric: str) -> float | None:
        return result.metrics[metric].mean if metric in result.metrics else None

    @property
    def first(self) -> Result:
        """One of the results, for what they share."""
        return next(iter(self.results.values()))

    @property
    def milliseconds(self) -> float | None:
        """The least time to score a photograph, over the units, as others may have used a machine too; None if it was
        never measured."""
        known = [result.latency for result in self.results.values() if result.latency is not None]
        return 1000 * min(known) if known else None

    @property
    def parameters(self) -> int:
        return self.first.extractor.parameters

    @property
    def product(self) -> Product:
        return self.first.extractor.product

    @property
    def seen(self) -> str:
        """Whether the pretraining saw photographs of a data set, over the units: the worst answer."""
        answers = {result.overlap.answer for result in self.results.values()}
        return next(answer for answer in ("some", "unknown", "none") if answer in answers)


@dataclass(frozen=True)
class Task:
    """A task's two tables, best line first: of ``features``, over data sets and detectors (empty if there is only one
    detector), and of every pair. ``rare``: sets that are not ranked, as fewer than half of the pairs have them."""

    name: str
    sets: tuple[str, ...]
    features: tuple[Line, ...]
    pairs: tuple[Line, ...]
    rare: tuple[str, ...] = ()


def tasks_of(results: Sequence[Result], filters: Filters | None = None) -> list[Task]:
    """Return the tasks of a board, in the order of their names. Raises ValueError for a filter that fits nothing, and
    if no result is left."""
    filters = filters or Filters()
    _check_patterns(filters, results)
    kept = [result for result in results if filters.keep(result)]
    if not kept:
        raise ValueError(f"none of the {len(results)} results is left by the filters together: leave one of them out")
    features, detectors = _features_names(kept), _detector_names(kept)
    found: dict[str, list[Result]] = defaultdict(list)
    for result in kept:
        found[result.task].append(result)
    return [_task(name, found[name], features, detectors) for name in sorted(found)]


def _check_patterns(filters: Filters, results: Sequence[Result]) -> None:
    known = {
        "tasks": {result.task for result in results},
        "sets": {result.data.name for result in results},
        "detectors": {result.detector.name for result in results},
    }
    for name, valid in known.items():
        for pattern in getattr(filters, name):
            if not fnmatch.filter(valid, pattern):
                raise ValueError(f"--{name} {pattern!r} fits none of: {'; '.join(sorted(valid))}")


def _task(
    name: str, results: Sequence[Result], features: Callable[[Result], str], detectors: Callable[[Result], str]
) -> Task:
    pairs: dict[tuple[str, str | None], dict[Unit, Result]] = defaultdict(dict)
    whole: dict[tuple[str, str | None], dict[Unit, Result]] = defaultdict(dict)
    sets = _common_sets(results)
    for result in sorted(results, key=lambda result: (result.data.name, detectors(result))):
        if result.data.name not in sets:
            continue
        pairs[features(result), detectors(result)][(result.data.name,)] = result
        whole[features(result), None][(result.data.name, detectors(result))] = result
    several = len({detector for _, detector in pairs}) > 1
    rare = tuple(sorted({result.data.name for result in results} - {*sets}))
    return Task(name, sets, _lines(whole) if several else (), _lines(pairs), rare)


def _common_sets(results: Sequence[Result]) -> tuple[str, ...]:
    """The data sets that at least half of as many pairs have as the set that most have: one person's own set must not
    take everybody else out of the ranking."""
    counts = Counter(result.data.name for result in results)
    return tuple(sorted(name for name, count in counts.items() if 2 * count >= max(counts.values())))


def _lines(contestants: Mapping[tuple[str, str | None], Mapping[Unit, Result]]) -> tuple[Line, ...]:
    """Rank those that have all units, best first, and list the others after them."""
    units = list(dict.fromkeys(unit for own in contestants.values() for unit in own))
    absent = {name: tuple(unit for unit in units if not _ranked(own.get(unit))) for name, own in contestants.items()}
    complete = {name: own for name, own in contestants.items() if not absent[name]}
    places = standings(complete)
    lines = [Line(*name, own, places.get(name), absent[name]) for name, own in contestants.items()]
    return tuple(sorted(lines, key=_order))


def _order(line: Line) -> tuple[float, ...]:
    value = float(np.mean(line.defined(METRICS[0]) or [0]))
    place = line.standing
    return (len(line.missing), *((place.best, place.worst, place.mean_rank) if place else ()), -value)


def _ranked(result: Result | None) -> bool:
    return result is not None and result.metrics["image_auroc"].mean is not None


def _features_names(results: Sequence[Result]) -> Callable[[Result], str]:
    """How the board calls features: by their label, with a piece of a digest where two different ones share it."""

    def identity(result: Result) -> tuple[str, int]:
        own = result.extractor
        return own.digest or own.weights, own.image_size

    return _told_apart(results, lambda result: result.extractor.label, identity)


def _detector_names(results: Sequence[Result]) -> Callable[[Result], str]:
    """How the board calls detectors: by their name, with a piece of a digest where two have different options."""
    return _told_apart(results, lambda result: result.detector.name, lambda result: (result.detector.digest, 0))


def _told_apart(
    results: Sequence[Result], label: Callable[[Result], str], identity: Callable[[Result], tuple[str, int]]
) -> Callable[[Result], str]:
    known: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for result in results:
        known[label(result)].add(identity(result))

    def name(result: Result) -> str:
        text = label(result)
        if len(known[text]) == 1:
            return text
        digest, size = identity(result)
        same = len({own for own, _ in known[text]}) == 1
        return f"{text}, {size} px" if same else f"{text} @{digest[:7]}"

    return name
