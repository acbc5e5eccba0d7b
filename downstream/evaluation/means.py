"""Means of an evaluation over products, their spread over repeats, and what pretrained features gain.

`trial.run_trial` returns records. A repeat is one draw with one extractor; its mean over products is one number, and
the spread is the standard deviation (n - 1) of these numbers. Means are in per cent, except d'. Wrongly classified
images are not averaged over products but counted, as in PatchCore Tab. 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adpretrain.card import METRICS
from downstream.evaluation.comparison import PRETRAINED

FALSE_POSITIVES, FALSE_NEGATIVES = COUNTS = ("false_positives_at_best_f1", "false_negatives_at_best_f1")
SPRO = {"spro_05": 0.05, "spro_30": 0.3}  # areas under sPRO, up to these false positive rates
TITLES = {
    **METRICS,
    "spro_05": "sPRO to FPR 0.05",
    "spro_30": "sPRO to FPR 0.3",
    "aupro_official": "AUPRO, 200 steps",
    "d_prime": "d'",
    FALSE_POSITIVES: "false positives at best F1",
    FALSE_NEGATIVES: "false negatives at best F1",
}
D_PRIME = "d_prime"  # a ratio without an upper bound; all other metrics except the counts are shares
MAIN = ("image_auroc", "pixel_auroc", "aupro")  # the metrics that the paper reports
AT_BEST_F1 = ("image_f1", "image_accuracy_at_best_f1")  # their threshold is chosen on the labels of the test images
MEAN = "mean over sets"

Record = dict[str, Any]
Repeat = tuple[int, int]  # draw, extractor


@dataclass(frozen=True)
class Row:
    """One row of the table. ``mean`` maps a metric to its mean over products and repeats, ``spread`` to its standard
    deviation between repeats (0 if there is one); errors are summed over products."""

    setting: str
    detector: str
    features: str
    products: int
    repeats: int
    defined: dict[str, int]  # number of products whose metric is defined; only they enter the mean
    mean: dict[str, float]
    spread: dict[str, float]
    gain: dict[str, float] | None  # of pretrained features, see `_gains`; None for others
    gain_spread: dict[str, float] | None


def main_metrics(records: Iterable[Record]) -> tuple[str, ...]:
    """Return `MAIN`, and sPRO if it was measured: only sets that say how much of a defect is enough have it."""
    records = list(records)
    measured = (name for name in SPRO if any(record["metrics"].get(name) is not None for record in records))
    return (*MAIN, *measured)


def in_order(records: Sequence[Record]) -> list[Record]:
    """Sort records by the order of their cells, then by product, whichever process finished first."""
    return sorted(records, key=lambda r: (r["order"], r["product"]))


def summarise(records: Sequence[Record]) -> list[Row]:
    """Return a row for every setting, detector and kind of features, in the order of the records."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["setting"], record["detector"], record["features"]), []).append(record)
    means = {key: {name: _repeats(group, name) for name in TITLES} for key, group in groups.items()}
    rows = []
    for key, group in groups.items():
        same = [other for other in groups if other[:2] == key[:2] and groups[other][0]["kind"] != PRETRAINED]
        gains = None
        if group[0]["kind"] == PRETRAINED and same:
            shares = [name for name in TITLES if name not in COUNTS]
            gains = {name: _gains(means[key][name], [means[other][name] for other in same]) for name in shares}
        named = {name: {r["product"] for r in group if r["metrics"].get(name) is not None} for name in TITLES}
        rows.append(
            Row(
                *key,
                products=len({record["product"] for record in group}),
                repeats=len({(record["draw"], record["extractor"]) for record in group}),
                defined={name: len(products) for name, products in named.items()},
                mean={name: mean_of(found.values()) for name, found in means[key].items()},
                spread={name: _spread(found.values()) for name, found in means[key].items()},
                gain=None if gains is None else {name: mean_of(found) for name, found in gains.items()},
                gain_spread=None if gains is None else {name: _spread(found) for name, found in gains.items()},
            )
        )
    return rows


def _repeats(group: Sequence[Record], name: str) -> dict[Repeat, float]:
    """Return a metric's mean over products, as `shown`, in every repeat; undefined values are left out."""
    found: dict[Repeat, list[float]] = defaultdict(list)
    for record in group:
        if (value := record["metrics"].get(name)) is not None:
            found[record["draw"], record["extractor"]].append(shown(name, value))
    return {repeat: sum(values) if name in COUNTS else mean_of(values) for repeat, values in found.items()}


def _gains(ours: dict[Repeat, float], untrained: Sequence[dict[Repeat, float]]) -> list[float]:
    """Return, for each repeat, how much better a metric is than in the row of untrained features with the best mean, in
    the same draw where it has that draw: what varies alike from draw to draw is no spread of the gain."""
    best = max(untrained, key=lambda row: mean_of(row.values()) if row else -np.inf)
    draws: dict[int, list[float]] = defaultdict(list)
    for (draw, _), value in best.items():
        draws[draw].append(value)
    return [value - mean_of(draws.get(draw) or best.values()) for (draw, _), value in ours.items()]


def shown(name: str, value: float) -> float:
    """Convert a metric to the unit of the tables: per cent, except for d' and errors."""
    return value if name in (D_PRIME, *COUNTS) else 100 * value


def mean_of(values: Iterable[float]) -> float:
    found = list(values)
    return float(np.mean(found)) if found else float("nan")


def _spread(values: Iterable[float]) -> float:
    found = list(values)
    return float(np.std(found, ddof=1)) if len(found) > 1 else 0.0


def by_set(records: Sequence[Record]) -> list[tuple[str, Row]]:
    """Return the rows of the table for every data set and, if there are several, for their mean. Metrics are averaged
    over the products of a set first, then over repeats. The mean over sets is computed in each repeat, so that its
    spread is that of whole comparisons; every set has the same weight.
    """
    sets: dict[str, dict[tuple[Any, ...], list[Record]]] = {}
    for record in records:
        key = tuple(record[name] for name in ("setting", "detector", "features", "draw", "extractor"))
        sets.setdefault(record["set"], {}).setdefault(key, []).append(record)
    means = {name: [_over_products(name, found) for found in cells.values()] for name, cells in sets.items()}
    out = [(name, row) for name, found in means.items() for row in summarise(found)]
    if len(sets) > 1:
        out += [(MEAN, row) for row in summarise([record for found in means.values() for record in found])]
    return out


def _over_products(name: str, records: Sequence[Record]) -> Record:
    """Merge the records of a set's products into one: each metric is averaged over the products that define it."""
    values = {
        metric: [r["metrics"][metric] for r in records if r["metrics"].get(metric) is not None]
        for metric in (*MAIN, *SPRO)
    }
    metrics = {metric: sum(found) / len(found) if found else None for metric, found in values.items()}
    return {**records[0], "product": name, "metrics": metrics}
