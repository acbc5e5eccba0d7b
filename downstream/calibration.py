"""A threshold with a known false-alarm rate, from normal photographs alone (conformal p-values).

Given the scores c_1..c_n of n normal photographs, a new photograph with score s gets the p-value

    p(s) = (1 + #{i : c_i >= s}) / (n + 1)

and is called anomalous when p <= alpha, which is the same as s > (the k-th largest c_i) with k = floor(alpha (n + 1)).
The smallest possible p-value is 1 / (n + 1), so that n photographs cannot promise a lower rate.

What the promise depends on
- *Exchangeability*: new normal photographs and the calibration photographs must come from the same distribution (same
  product, camera and light, and no selection such as hand-picked good shots, or all shots of one morning). Drift
  violates it, and no computation here can detect that.
- *Extra photographs* that are not references and are scored exactly like new ones make the rate exact (split
  conformal): P(p <= alpha) <= alpha for a normal photograph, on average over the draw of the calibration set.
- *Leave-one-out* scores compare each of the K references with the other K - 1. A new photograph is compared with K
  references, one more, so it tends to score lower, and the rate tends to stay below the promise. If adding a reference
  can never raise a score (as for the norm of the raw residual to the nearest reference, a minimum over a larger set),
  the promise holds exactly: all K + 1 leave-one-out scores within the joint set would be exchangeable, and the
  calibration scores can only be larger than those. With a projector, or a scale estimated from the references, a score
  may rise, and leave-one-out is an approximation, as in the jackknife: usually conservative, but without a proof.
- *Both kinds pooled* give the weaker of the two guarantees, an approximation.
- *Two measures*: the score a, and u, which says how far the photograph as a whole is from the normals
  (`downstream.appearance`). A photograph is anomalous when one of them is above its threshold, and the promise holds
  for both together; see `joint_thresholds`.
- The rate is an average over calibration sets. For a given set it is distributed like Beta(k, n + 1 - k);
  `Calibration.rate_upper` is the 95 % quantile, which for four photographs is far above the average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # scipy.stats takes a second to import

from downstream.metric_counts import real_numbers

# Added before floor, since alpha (n + 1) can be rounded down to just below an integer, such as 0.29 * 100.
_ROUNDING = 1e-9
TAU, ODD = 3.0, 2.0  # see joint_thresholds
DRIFT_LEVEL = 0.01
_LARGEST_LOG = 700.0  # its exponential is still a finite float


@dataclass(frozen=True)
class Calibration:
    """Thresholds and the rate they promise. A photograph is anomalous when its score is strictly greater than
    `threshold`, or its `unlike` value is strictly greater than `unlike_threshold` (infinite if not measured)."""

    threshold: float
    rate: float  # the promised false-alarm rate, at most `asked_rate` unless `warnings` says so
    rate_upper: float  # 95 % quantile of the rate over calibration sets of this size
    asked_rate: float
    scores: tuple[float, ...]  # the n calibration scores, descending
    warnings: tuple[str, ...] = ()
    unlike_threshold: float = math.inf
    unlike: tuple[float, ...] = ()  # the unlike values of the same n photographs, in the order of `scores`

    def p_values(self, scores: ArrayLike) -> NDArray[np.float64]:
        """scores [B] -> p-values [B] in [1 / (n + 1), 1]. Raises ValueError for NaN, which could pass as normal."""
        return conformal_p_values(self.scores, scores)

    def unlike_p_values(self, unlike: ArrayLike) -> NDArray[np.float64]:
        """unlike values [B] -> p-values [B]. Raises ValueError if those of the normals were not measured."""
        return conformal_p_values(self.unlike, unlike)

    def is_anomalous(self, scores: ArrayLike) -> NDArray[np.bool_]:
        """scores [B] -> bool [B]; equal to p_values(scores) <= rate if nothing but the scores was calibrated."""
        return _finite(scores, "scores") > self.threshold

    def exceeds(self, alarms: int, photographs: int) -> bool:
        """Test at the 1 % level whether there are more alarms than normal photographs would give.

        The test is one-sided: the probability that at least ``alarms`` of m exchangeable normal photographs are above
        the k-th largest of n is beta-binomial with (m, k, n + 1 - k). It is the binomial probability averaged over
        calibration sets, because with few normals the rate of a given set may be well above the promise.
        """
        n = len(self.scores)
        rank = round(self.rate * (n + 1))
        more = np.arange(alarms, photographs + 1)  # numbers of alarms that are at least as high
        rest = photographs - more
        ways = special.gammaln(photographs + 1) - special.gammaln(more + 1) - special.gammaln(rest + 1)
        log_p = ways + special.betaln(more + rank, rest + n + 1 - rank) - special.betaln(rank, n + 1 - rank)
        return bool(np.exp(log_p).sum() <= DRIFT_LEVEL)


def conformal_p_values(calibration: ArrayLike, scores: ArrayLike) -> NDArray[np.float64]:
    """Return p = (1 + #{calibration >= s}) / (n + 1) for every s of scores [B]: [B], in O((n + B) log n).

    calibration: [n], n > 0. Raises ValueError if it is empty, and for NaN or infinite values in either argument.
    """
    ascending = np.sort(_several(calibration, "calibration scores"))
    if len(ascending) == 0:
        raise ValueError("no calibration scores: a p-value needs the score of at least one normal photograph")
    below = np.searchsorted(ascending, _finite(scores, "scores"), side="left")
    return np.asarray(1.0 + len(ascending) - below, dtype=np.float64) / (len(ascending) + 1)


def photographs_needed(rate: float) -> int:
    """Return the smallest n with 1 / (n + 1) <= rate: 19 for 5 %, 99 for 1 %."""
    return math.ceil(1.0 / _rate(rate) - 1.0 - _ROUNDING)


def calibrate(
    leave_one_out: ArrayLike = (),
    rate: float = 0.05,
    extra: ArrayLike = (),
    unlike: tuple[ArrayLike, ArrayLike] | None = None,
) -> Calibration:
    """Compute thresholds for the false-alarm rate `rate` in (0, 1).

    leave_one_out: [K] scores of the references, each against the other K - 1 (may be empty). extra: [M] scores of
    normal photographs that are not references, against all K. If M is enough for `rate`, only ``extra`` is used, as
    the promise is then exact; otherwise both are pooled. If even n = K + M is too few, the smallest possible rate
    1 / (n + 1) is used instead and `warnings` says so. ``unlike`` holds the [K] and [M] unlike values of the same
    photographs; the rate is then that of both together. Raises ValueError if there are no scores, for a rate outside
    (0, 1), and for NaN or infinite scores.
    """
    needed = photographs_needed(rate)
    loo, more = _several(leave_one_out, "leave-one-out scores"), _several(extra, "extra scores")
    alone = len(more) >= needed
    pooled = more if alone else np.concatenate([loo, more])
    if len(pooled) == 0:
        raise ValueError(
            "no calibration scores: give at least 2 reference photographs (leave-one-out), or normal "
            "photographs that are not references, or choose the threshold yourself"
        )
    n, order_n, warnings = len(pooled), np.argsort(-pooled, kind="stable"), list[str]()
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
    values, limit, unlike_limit = np.empty(0), float(pooled[order_n][rank - 1]), math.inf
    if unlike is not None:
        own, others = (_several(part, "unlike values") for part in unlike)
        values = others if alone else np.concatenate([own, others])
        limit, unlike_limit = joint_thresholds(pooled, values, rank)
        values = values[order_n]
    return Calibration(
        threshold=limit,
        rate=rank / (n + 1),
        rate_upper=float(special.betaincinv(rank, n + 1 - rank, 0.95)),
        asked_rate=rate,
        scores=tuple(pooled[order_n].tolist()),
        warnings=tuple(warnings),
        unlike_threshold=unlike_limit,
        unlike=tuple(values.tolist()),
    )


def joint_thresholds(scores: ArrayLike, unlike: ArrayLike, rank: int) -> tuple[float, float]:
    """Return thresholds (of score and unlike value) that at most ``rank`` of n + 1 exchangeable photographs exceed.

    Both are combined in one conformal score c = max(a / m_a, f(u / (TAU m_u))), where m_a and m_u are the medians of
    all n + 1 photographs, including the new one. Every order of the n + 1 is then equally likely, and at most k of them
    rank among the k highest. The values of the new photograph are not known yet, but can move a median by at most one
    place. In the unit of a, the threshold of c grows with m_a and falls with m_u; in the unit of u, it is the other way
    round. So the neighbouring order statistics give two fixed numbers that depend only on the n normals: a photograph
    that exceeds one of them has c among the k highest, and the promise holds without approximation. (With few normals,
    the thresholds are a little too high.)

    f(x) is 0 up to x = 1, so that a photograph that resembles the normals as they resemble each other is judged only by
    its score, with the same threshold as without u. Beyond, f(x) = ODD (1 + log(x)): x = 1 counts like a score of ODD
    times the median, and the logarithm limits how far one odd normal moves the threshold of the score. m_u is at least
    1, the floor of the normal spread, so that invisible differences raise no alarm where products hardly vary.
    TAU = 3 and ODD = 2: of 238 good Magnetic Tiles held out in each of six draws, 0 to 1.7 % had u > 2.4 m_u, few
    scores exceeded 2 m_a, and in nine draws of 5 to 36 normals no threshold of the score moved (TAU = 2.5 cost half of
    the defects found with five normals).
    scores, unlike: [n], n > 0. If scores may be negative (as of an ensemble), the zero of a is the lowest score minus
    the range, and the promise is approximate. Raises ValueError if the two have different lengths.
    """
    score_n, unlike_n = _several(scores, "scores"), _several(unlike, "unlike values")
    if score_n.shape != unlike_n.shape:
        raise ValueError(
            f"{len(score_n)} scores and {len(unlike_n)} unlike values; expected one of each per photograph"
        )
    zero = 0.0 if score_n.min() > 0 else float(2 * score_n.min() - score_n.max()) - _ROUNDING
    score_n = score_n - zero
    (low_a, high_a), (low_u, high_u) = _median_range(score_n), np.maximum(_median_range(unlike_n), 1.0)
    shares_n = unlike_n / (TAU * low_u)
    as_scores = high_a * np.where(shares_n <= 1, 0.0, ODD * (1 + np.log(np.maximum(shares_n, 1))))
    ratios_n = np.minimum(score_n / low_a / ODD, 1 + _LARGEST_LOG)
    as_unlike = TAU * high_u * np.exp(np.maximum(ratios_n, 1) - 1)
    by_score, by_unlike = (
        float(np.sort(np.maximum(own, other))[::-1][rank - 1])
        for own, other in ((score_n, as_scores), (unlike_n, as_unlike))
    )
    return by_score + zero, by_unlike


def _median_range(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the (upper) median of n + 1 numbers, n of them known, if the unknown one is the lowest or the highest."""
    ascending, middle = np.sort(values), (len(values) + 1) // 2
    return float(ascending[middle - 1]), float(ascending[min(middle, len(values) - 1)])


def percent(rate: float) -> str:
    """0.05 -> '5 %', 1 / 3 -> '33.3 %', 0.0001 -> '0.01 %': three significant digits."""
    return f"{100 * rate:.3g} %"


def _rate(rate: float) -> float:
    if not isinstance(rate, int | float | np.number) or not 0 < rate < 1:  # also refuses NaN
        raise ValueError(f"false-alarm rate {rate!r}; expected a share between 0 and 1, e.g. 0.05 for 5 %")
    return rate


def _several(scores: ArrayLike | Sequence[float], name: str) -> NDArray[np.float64]:
    """Return finite scores [n], n >= 0. Raises ValueError for a single number."""
    array = _finite(scores, name)
    if array.ndim == 0:
        raise ValueError(f"{name} are the single number {array}; expected a list of one score per photograph")
    return array


def _finite(scores: ArrayLike | Sequence[float], name: str) -> NDArray[np.float64]:
    array = real_numbers(scores, name).astype(np.float64)
    if array.ndim > 1:
        raise ValueError(f"{name} have shape {array.shape}; expected one dimension")
    return array
