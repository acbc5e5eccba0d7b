"""Which product is it? The one of several inspectors whose normal photographs a new photograph resembles most."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from downstream.inspection.camera import Picture, Verdict
from downstream.inspection.inspector import Inspector
from downstream.inspection.results import NORMAL, UNDECIDED


@dataclass(frozen=True)
class Identified:
    """``product`` is None if the photograph is unlike all of them; ``p_values`` has that of every product, 0 where the
    photograph cannot be compared; ``verdicts`` those of all inspectors."""

    product: str | None
    p_values: dict[str, float]
    verdicts: dict[str, Verdict]


def identify(inspectors: Mapping[str, Inspector], image: Picture, name: str = "") -> Identified:
    """Ask every inspector, and take the product with the highest p-value among those that call the photograph normal.

    A good photograph of a product is called unlike its own product with a probability of at most the promised rate of
    that inspector. Nothing is promised about how often another product is taken for it: that depends on how much the
    products differ. The p-value is twice the smaller one of score and `unlike` value (Bonferroni), at most 1; among
    equal ones, the lowest score relative to its threshold wins. Raises ValueError for an image that is none, if there
    is no inspector, and for one without a threshold (a single normal photograph).
    """
    if not inspectors:
        raise ValueError("no inspector to ask: give at least one")
    if alone := [product for product, inspector in inspectors.items() if inspector.threshold is None]:
        raise ValueError(f"{alone[0]} has no threshold, as it has a single normal photograph: add another")
    verdicts = {product: inspector(image, name) for product, inspector in inspectors.items()}
    p_values = {product: _p_value(verdict) for product, verdict in verdicts.items()}
    possible = [product for product, verdict in verdicts.items() if verdict.verdict in (NORMAL, UNDECIDED)]

    def rank(product: str) -> tuple[float, float]:
        score, threshold = verdicts[product].score, inspectors[product].threshold
        assert score is not None
        assert threshold is not None
        return p_values[product], -score / threshold if threshold > 0 else -math.inf

    return Identified(max(possible, key=rank, default=None), p_values, verdicts)


def _p_value(verdict: Verdict) -> float:
    found = [p for p in (verdict.result.p_value, verdict.result.unlike_p_value) if p is not None]
    return min(1.0, len(found) * min(found)) if found else 0.0
