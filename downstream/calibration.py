"""A threshold with a known false-alarm rate, from normal photographs alone (conformal p-values).

Given the scores c_1..c_n of n normal photographs, a new photograph with score s gets the p-value

    p(s) = (1 + #{i : c_i >= s}) / (n + 1)

and is called anomalous when p <= alpha, which is the same as s > (the k-th largest c_i), k = floor(alpha (n +
1)). The smallest p-value there is equals 1 / (n + 1): a rate below that cannot be promised by n photographs.

What the promise rests on
- *Exchangeability*: the next normal photograph must be as if drawn from the same pot as the calibration
  photographs (same product, camera, light, and no selection: hand-picked good shots, or all shots of one
  morning, are not). Drift breaks it, and nothing computed here can notice.
- *Extra photographs*, not used as references, scored exactly as the new ones: the rate is then exact (split
  conformal): P(p <= alpha) <= alpha for a normal photograph, on average over the draw of the calibration set.
- *Leave-one-out* scores of the K references, each scored against the other K - 1: a new photograph meets K
  references, one more, so it tends to score lower, and the rate tends to stay below the promise. If adding a
  reference can never raise a score (the raw residual norm to the nearest reference: a minimum over a larger
  set) the promise holds exactly: all K + 1 leave-one-out scores within the joint set would be exchangeable,
  and the calibration scores can only be larger than those. With a projector, or a scale estimated from the
  references, a score may rise, and leave-one-out is an approximation, as in the jackknife: usually
  conservative, without a proof.
- *Both pooled*: the mixture inherits the weaker statement, an approximation.
- The rate is an average over calibration sets. For the one at hand it is spread like Beta(k, n + 1 - k);
  `Calibration.rate_upper` is its 95 % quantile, and for four photographs that is far above the average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from downstream.ground_truth import real_numbers

# floor(alpha (n + 1)) must not lose a step to the rounding of, say, 0.07 * 100 = 7.000000000000001 or 0.29 *
# 100.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Calibration:
    """A threshold and what it promises. A score is anomalous when it is strictly greater than `threshold`."""

    threshold: float
    rate: float  # the promised false-alarm rate, at most `asked_rate` unless `warnings` says so
    rate_upper: float  # 95 % quantile of the rate over calibration sets of this size
    asked_rate: float
    scores: tuple[float, ...]  # the n calibration scores, descending
    warnings: tuple[str, ...] = ()

    def p_values(self, scores: ArrayLike) -> NDArray[np.float64]:
        """scores [B] -> p-values [B] in [1 / (n + 1), 1]; ValueError for NaN (it would pass as normal or
        worse).
        """
        return conformal_p_values(self.scores, scores)

    def is_anomalous(self, scores: ArrayLike) -> NDArray[np.bool_]:
        """scores [B] -> bool [B]; equal to p_values(scores) <= rate."""
        return _finite(scores, "scores") > self.threshold


def conformal_p_values(calibration: ArrayLike, scores: ArrayLike) -> NDArray[np.float64]:
    """p = (1 + #{calibration >= s}) / (n + 1) for every s of scores [B] -> [B], in O((n + B) log n).

    calibration: [n], n > 0. Raises ValueError without any, and for NaN or infinite ones on either side.
    """
    ascending = np.sort(_several(calibration, "calibration scores"))
    if len(ascending) == 0:
        raise ValueError("no calibration scores: a p-value compares with those of at least one normal photograph")
    below = np.searchsorted(ascending, _finite(scores, "scores"), side="left")
    return np.asarray(1.0 + len(ascending) - below, dtype=np.float64) / (len(ascending) + 1)


def photographs_needed(rate: float) -> int:
    """The smallest n with 1 / (n + 1) <= rate: 19 for 5 %, 99 for 1 %."""
    return math.ceil(1.0 / _rate(rate) - 1.0 - _ROUNDING)


def calibrate(leave_one_out: ArrayLike = (), rate: float = 0.05, extra: ArrayLike = ()) -> Calibration:
    """A threshold for the false-alarm rate `rate` in (0, 1).

    leave_one_out: [K] scores of the references, each against the other K - 1 (may be empty). extra: [M]
    scores of normal photographs that are not references, against all K. When the M alone are enough for
    `rate` they are used alone, because their promise is exact; otherwise both are pooled. When even n = K + M
    is too few, the smallest possible rate 1 / (n + 1) is used instead and `warnings` says so. Raises
    ValueError without any score, for a rate outside (0, 1) and for NaN or infinite scores.
    """
    needed = photographs_needed(rate)
    loo, more = _several(leave_one_out, "leave-one-out scores"), _several(extra, "extra scores")
    pooled = more if len(more) >= needed else np.concatenate([loo, more])
    if len(pooled) == 0:
        raise ValueError(
            "no calibration scores: give at least 2 reference photographs (leave-one-out), or normal "
            "photographs that are not references, or choose the threshold yourself"
        )
    n, warnings = len(pooled), []
    rank = math.floor(rate * (n + 1) + _ROUNDING)
    if rank == 0:
        rank = 1
        warnings.append(
            f"{n} normal photograph{'s' if n > 1 else ''} cannot promise a false-alarm rate of "
            f"{percent(rate)}: the threshold is the highest normal score, which promises "
            f"{percent(1 / (n + 1))}. "
            f"For {percent(rate)} give {needed} normal photographs in all ({needed - n} more)."
        )
    if len(pooled) > len(more):
        warnings.append(
            "The rate rests on leave-one-out scores of the references: an approximation, usually on the safe "
            f"side. {needed} normal photographs that are not references make it exact."
        )
    descending = np.sort(pooled)[::-1]
    return Calibration(
        threshold=float(descending[rank - 1]),
        rate=rank / (n + 1),
        rate_upper=float(stats.beta.ppf(0.95, rank, n + 1 - rank)),
        asked_rate=rate,
        scores=tuple(descending.tolist()),
        warnings=tuple(warnings),
    )


def percent(rate: float) -> str:
    """0.05 -> '5 %', 1 / 3 -> '33.3 %', 0.0001 -> '0.01 %': three significant digits."""
    return f"{100 * rate:.3g} %"


def _rate(rate: float) -> float:
    if not isinstance(rate, int | float | np.number) or not 0 < rate < 1:  # also refuses NaN
        raise ValueError(f"false-alarm rate {rate!r}; expected a share between 0 and 1, e.g. 0.05 for 5 %")
    return rate


def _several(scores: ArrayLike | Sequence[float], name: str) -> NDArray[np.float64]:
    """Finite scores, none or more, where a single number would be a mistake."""
    array = _finite(scores, name)
    if array.ndim == 0:
        raise ValueError(f"{name} are the single number {array}; expected a list of one score per photograph")
    return array


def _finite(scores: ArrayLike | Sequence[float], name: str) -> NDArray[np.float64]:
    array = real_numbers(scores, name).astype(np.float64)
    if array.ndim > 1:
        raise ValueError(f"{name} have shape {array.shape}; expected one dimension")
    return array
