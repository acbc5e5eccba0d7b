"""The promised false-alarm rate holds in simulation; p-values are super-uniform; too few photographs are
said.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from downstream.calibration import calibrate, conformal_p_values, joint_thresholds, percent, photographs_needed

TRIALS = 4000


def nearest(points: NDArray, references: NDArray) -> NDArray:
    """Distance to the nearest reference: a score that adding a reference can only lower, like a residual
    norm.
    """
    return np.linalg.norm(points[:, None] - references[None], axis=-1).min(axis=1)


def leave_one_out(references: NDArray) -> NDArray:
    distances = np.linalg.norm(references[:, None] - references[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    return distances.min(axis=1)


def most_allowed(rate: float) -> float:
    """Upper end of the 99.99 % binomial range of a share measured in TRIALS independent trials."""
    return stats.binom.ppf(0.9999, TRIALS, rate) / TRIALS


def fewest_allowed(rate: float) -> float:
    return stats.binom.ppf(0.0001, TRIALS, rate) / TRIALS


@pytest.mark.parametrize(("n", "rate"), [(4, 0.2), (19, 0.05), (30, 0.1), (99, 0.07)])
def test_extra_photographs_give_the_promised_rate(n: int, rate: float) -> None:
    rng = np.random.default_rng(n)
    alarms, promised = 0, set()
    for _ in range(TRIALS):
        calibration = calibrate([], rate, extra=rng.gamma(2.0, size=n))
        promised.add(calibration.rate)
        alarms += bool(calibration.is_anomalous(rng.gamma(2.0, size=1))[0])
    (promise,) = promised
    assert promise <= rate + 1e-12
    # Exact for continuous scores: neither above the promise nor needlessly below it.
    assert fewest_allowed(promise) <= alarms / TRIALS <= most_allowed(promise)


@pytest.mark.parametrize(("k", "rate"), [(4, 0.2), (8, 0.25), (19, 0.05)])
def test_leave_one_out_stays_below_the_promised_rate(k: int, rate: float) -> None:
    rng = np.random.default_rng(k)
    alarms = 0
    for _ in range(TRIALS):
        references, new = rng.normal(size=(k, 3)), rng.normal(size=(1, 3))
        alarms += bool(calibrate(leave_one_out(references), rate).is_anomalous(nearest(new, references))[0])
    assert alarms / TRIALS <= most_allowed(rate)


def test_p_values_are_super_uniform_also_with_ties() -> None:
    rng = np.random.default_rng(0)
    draws = rng.poisson(3.0, size=(TRIALS, 20)).astype(float)  # many ties
    p = np.array([conformal_p_values(row[:-1], row[-1:])[0] for row in draws])
    for alpha in (0.05, 0.1, 0.25, 0.5, 0.9):
        assert (p <= alpha).mean() <= most_allowed(alpha)


def test_p_values_by_hand() -> None:
    np.testing.assert_array_equal(conformal_p_values([1.0, 2.0, 3.0], [0.5, 2.0, 2.5, 9.0]), [1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("rate", [0.05, 0.07, 0.1, 0.29, 0.3, 1 / 3, 0.5])
@pytest.mark.parametrize("n", [1, 2, 6, 9, 19, 99])
def test_verdict_equals_p_value_at_most_the_rate(n: int, rate: float) -> None:
    rng = np.random.default_rng(n)
    calibration = calibrate(np.round(rng.normal(size=n), 1), rate)
    scores = np.concatenate([np.round(rng.normal(size=200), 1), calibration.scores])
    np.testing.assert_array_equal(
        calibration.is_anomalous(scores), calibration.p_values(scores) <= calibration.rate + 1e-12
    )


def test_rounding_does_not_lose_a_step() -> None:
    # 0.29 * 100 is 28.999999999999996 in floating point; the 29th largest of 99 scores is meant.
    assert calibrate([], 0.29, extra=np.arange(99.0)).threshold == 99 - 29
    assert photographs_needed(0.05) == 19
    assert photographs_needed(0.01) == 99
    assert photographs_needed(1 / 3) == 2


def test_too_few_photographs_fall_back_and_say_what_is_promised_and_needed() -> None:
    calibration = calibrate([0.3, 0.1, 0.4, 0.2], 0.05)
    assert calibration.threshold == 0.4
    assert calibration.rate == pytest.approx(0.2, abs=1e-12)
    warning = calibration.warnings[0]
    assert "4 normal photographs cannot promise a false-alarm rate of 5 %" in warning
    assert "promises 20 %" in warning
    assert "19 normal photographs in all (15 more)" in warning
    # For these four photographs the true rate may be far above the average promise: Beta(1, 4).
    assert calibration.rate_upper == pytest.approx(1 - 0.05 ** (1 / 4), abs=1e-9)


def test_enough_extra_photographs_are_used_alone_because_they_are_exact() -> None:
    calibration = calibrate([100.0, 200.0], 0.05, extra=np.arange(19.0))
    assert calibration.threshold == 18.0
    assert calibration.warnings == ()


def test_too_few_extra_photographs_are_pooled_with_the_references() -> None:
    calibration = calibrate([100.0, 200.0], 0.05, extra=np.arange(17.0))
    assert len(calibration.scores) == 19
    assert calibration.threshold == 200.0
    assert calibration.rate == pytest.approx(0.05, abs=1e-12)
    assert "approximation" in calibration.warnings[0]


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 5.0, float("nan")])
def test_a_rate_outside_0_1_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="false-alarm rate"):
        calibrate([1.0, 2.0], rate)


def test_no_scores_and_nan_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 reference photographs"):
        calibrate([], 0.05)
    with pytest.raises(ValueError, match="NaN"):
        calibrate([1.0, float("nan")], 0.05)
    with pytest.raises(ValueError, match="NaN"):
        calibrate([1.0, 2.0]).p_values([float("nan")])
    with pytest.raises(ValueError, match="one dimension"):
        calibrate([[1.0, 2.0]])


@pytest.mark.parametrize(("n", "rate"), [(4, 0.2), (8, 0.25), (19, 0.05), (30, 0.1)])
@pytest.mark.parametrize("together", [0.0, 0.9])
def test_score_and_unlike_value_keep_the_promise_together(n: int, rate: float, together: float) -> None:
    """Exchangeable pairs, independent or correlated, the unlike value with the heavier tail; both do alarm."""
    rng = np.random.default_rng([n, round(10 * together)])
    alarms = by_score = by_unlike = moved = 0.0
    for _ in range(TRIALS):
        normal_2 = rng.normal(size=(2, n + 1))
        mixed = together * normal_2[0] + (1 - together) * normal_2[1]
        scores, unlike = np.exp(0.15 * normal_2[0]), np.exp(0.4 * mixed)
        calibration = calibrate([], rate, scores[:n], ([], unlike[:n]))
        above, beyond = scores[n] > calibration.threshold, unlike[n] > calibration.unlike_threshold
        alarms, by_score, by_unlike = alarms + (above or beyond), by_score + above, by_unlike + beyond
        moved += calibration.threshold / calibrate([], rate, scores[:n]).threshold / TRIALS
    assert calibration.rate * 0.7 < alarms / TRIALS <= most_allowed(calibration.rate)
    assert by_score > 0
    assert 1 - 1e-9 < moved < 1.1  # the threshold of the score
    assert by_unlike > 0


def test_every_one_of_n_plus_1_is_treated_alike() -> None:
    """Exact, not on average: of any five photographs at most one is above the thresholds of the four others."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        scores, unlike = rng.gamma(3, size=5), np.exp(1.5 * rng.normal(size=5))
        alarms = 0
        for new in range(5):
            others = np.arange(5) != new
            limit, unlike_limit = joint_thresholds(scores[others], unlike[others], rank=1)
            alarms += scores[new] > limit or unlike[new] > unlike_limit
        assert alarms <= 1


def test_negative_scores_and_one_odd_normal() -> None:
    """An ensemble's scores lie about 0; one normal far off in one respect moves the other threshold a little only."""
    rng = np.random.default_rng(0)
    scores, unlike = rng.normal(size=40), rng.gamma(3, size=40)
    limit, unlike_limit = joint_thresholds(scores, unlike, rank=2)
    assert np.sort(scores)[-2] <= limit < np.sort(scores)[-2] + 1
    assert np.sort(unlike)[-2] <= unlike_limit < 3 * np.sort(unlike)[-2]
    shifted = joint_thresholds(scores - 100, unlike, rank=2)
    assert shifted == pytest.approx((limit - 100, unlike_limit))
    positive = rng.gamma(50, size=20)
    usual, _ = joint_thresholds(positive, unlike[:20], rank=1)
    moved, _ = joint_thresholds(positive, np.append(unlike[:19], 1000.0), rank=1)
    assert moved < 15 * usual  # it is 300 times as odd
    with pytest.raises(ValueError, match="3 scores and 2 unlike values"):
        joint_thresholds([1, 2, 3], [1, 2], 1)


def test_more_alarms_than_promised_are_told_at_the_1_percent_level() -> None:
    """Against a simulation: the alarms among m normal photographs, each with a calibration set of its own."""
    rng = np.random.default_rng(0)
    n, rate, photographs = 19, 0.1, 40
    counts = []
    for _ in range(TRIALS):
        calibration = calibrate([], rate, rng.normal(size=n))
        counts.append(int(calibration.is_anomalous(rng.normal(size=photographs)).sum()))
    told = [calibration.exceeds(alarms, photographs) for alarms in range(photographs + 1)]
    assert told == sorted(told)
    first = told.index(True)
    assert np.mean(np.array(counts) >= first) <= stats.binom.ppf(0.9999, TRIALS, 0.01) / TRIALS
    assert np.mean(np.array(counts) >= first - 1) > 0.005  # one alarm fewer would be said too often
    assert not calibration.exceeds(0, 0)


def test_percent_reads_well() -> None:
    assert [percent(rate) for rate in (0.05, 1 / 3, 0.0001, 0.2)] == ["5 %", "33.3 %", "0.01 %", "20 %"]


@pytest.mark.parametrize(("n", "rate"), [(4, 0.2), (20, 0.05), (99, 0.1)])
@pytest.mark.parametrize("photographs", [1, 30, 1000])
def test_drift_is_scipys_beta_binomial_tail(n: int, rate: float, photographs: int) -> None:
    calibration = calibrate(extra=np.arange(1.0, n + 1), rate=rate)
    rank = round(calibration.rate * (n + 1))
    assert calibration.rate_upper == pytest.approx(stats.beta.ppf(0.95, rank, n + 1 - rank), rel=1e-9)
    tail = stats.betabinom.sf(np.arange(-1, photographs), photographs, rank, n + 1 - rank)
    for alarms in range(0, photographs + 1, max(1, photographs // 40)):
        if abs(tail[alarms] - 0.01) > 1e-9:
            assert calibration.exceeds(alarms, photographs) == (tail[alarms] <= 0.01)
