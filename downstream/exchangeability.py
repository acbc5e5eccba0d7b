"""Watch whether new photographs still look exchangeable with the normal ones, and since when they do not.

The promised false-alarm rate (`downstream.calibration`) rests on exchangeability. A lamp that ages, a lens that was
touched, another material break it. `Watch` tests it after every photograph, for as long as the line runs.

*p-values.* Photographs that are all compared with the same n calibration scores have p-values that depend on each
other: if these n happen to be low, all of them are small, and a bet on small p-values wins although nothing has changed
(one power bet from the start, n = 8: in 24 % of lives of 300
photographs). So each photograph is ranked among the calibration *and all photographs before
it* (Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2nd ed., eq. 2.20):

    p_t = (#{s_i > s_t} + tau_t (1 + #{s_i = s_t})) / (1 + number of s_i),   tau_t uniform in [0, 1]

If all scores are exchangeable, p_1, p_2, ... are independent and uniform for any n, even 0, and for any ties.

*Bets.* A bet f with integral 1 over [0, 1] multiplies a stake by f(p_t), on average by 1. We bet on small p-values with

    f(p) = max(p, FLOOR)^(e - 1) / Z,   e in POWERS

A change may begin at any photograph, and a stake that was on the table before has been lost by then. So we start with
the wealth 1, of which 1 / (1 + log(1 + t)) is still in the purse after t photographs; what leaves the purse before a
photograph is staked on it and all later ones. The wealth is a nonnegative martingale, and by Ville's inequality it
reaches 1 / level with a probability of at most `level` *over the whole life*, however long.

*Higher and lower* are two martingales. Higher scores are ranked among all, lower ones among the new photographs only:
leave-one-out scores of references tend to lie above those of new photographs, which is no change of the line. (So
scores that are too low from the first photograph on are not found.) With M measures there are 2 M martingales, each of
which is divided by 2 M (Bonferroni): the level holds for all together.

*Since when.* For each bet we keep the start that maximises the product of its factors up to now (as CUSUM does); at the
warning, the start of the largest product is the estimate.

*Bad parts* among the goods are not exchangeable with normal photographs, so that the level does not cover them. FLOOR
limits what one of them wins (to a factor of 4.5), while each good one loses a little. With 2 % of bad parts that score
above everything, 0.8, 0.8 and 1.4 % of 2000 lives of 1000 photographs had a warning (8, 20 and 100 normals). Five bad
parts in a row after 60 good ones are told in 3 % of lives, eight in a row in 55 %: a reason to look at the line.

*What was measured* (20 normals, 60 goods, then scores higher by d standard deviations; 10, 50 and 90 % of the delays):
d = 1: 16, 35, 84; d = 2: 9, 12, 16; d = 4: 7, 9, 9 photographs. Without any change, 0.5 to 0.7 % of 10,000 lives of 300
photographs had a warning (4 to 100 normals). Median delays of other bets, as one martingale for both directions (there,
ours are 32, 11, 8): linear 35, 19, 17; powers without a floor 48, 13, 8, but five bad parts in a row warn in 13 %; the
Simple Jumper 42, 24, 21; Shiryaev-Roberts, with the weaker promise of 1 % within 10,000 photographs, 51, 14, 10.

*What cannot be found.* A change is found if it is large compared with how much good photographs differ. 15 % more light
on bottles under one lamp (brightness varies by 1 %) is found after 10 photographs, but not within 60 on Magnetic Tiles,
whose brightness varies by 31 %. Evidence is bounded by the number of photographs before the change: with 4 normals and
a change at once, only a large one is found, and late.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Self

from downstream.ascending import Ascending
from downstream.calibration import percent
from downstream.metric_counts import real_numbers

POWERS = (0.1, 0.6)
FLOOR = 0.05
MOST_PEAKS = 1000
Direction = Literal["higher", "lower"]

_LOG_Z = [math.log(FLOOR**power + (1 - FLOOR**power) / power) for power in POWERS]


@dataclass(frozen=True)
class Change:
    """A warning. Photographs are counted from 0, those that calibrate not included."""

    since: int  # the photograph at which the change seems to have begun
    at: int  # the photograph at which the evidence reached 1 / level
    measure: str
    direction: Direction
    level: float

    def in_words(self, since: str = "", at: str = "") -> str:
        """Say what was found and what to do; `since` and `at` name the two photographs, by default by their number."""
        first, found = since or f"photograph {self.since + 1}", at or f"photograph {self.at + 1}"
        begin = f"Since about {first} the photographs no longer look like those before"
        if self.since == 0:
            begin = f"From the first one on, {first}, the photographs do not look like the normal ones"
        risk = ""
        if self.direction == "lower":
            risk = " The threshold may now be too high, so that defects are missed."
        return (
            f"{begin}: their {self.measure} is {self.direction} (found at {found}; a line that does not change "
            f"gets such a warning with a probability of at most {percent(self.level)} over its whole life). The "
            "promised false-alarm rate no longer holds."
            f"{risk} Look at the photographs since then: if they are good, add some of them to the normal photographs; "
            "if not, look for what has changed, such as lamp, camera, lens or material. Photographs that were taken "
            "before and after the change are best scored apart."
        )


class Watch:
    """A test of exchangeability that goes on as long as photographs come. O(log n) comparisons and 16 M bytes for each.

    calibration: scores of n >= 0 normal photographs, [n], or [n, M] for M measures, such as score and `unlike` value,
    in any order. level: the probability that a line that does not change ever gets a warning. seed: of the draws that
    break ties; the same calibration, seed and scores give the same bytes. measures: their M names, for the words.
    Raises ValueError for NaN or infinite values, another shape, and a level outside (0, 1).
    """

    def __init__(
        self, calibration: ArrayLike, level: float = 0.01, seed: int = 0, measures: Sequence[str] = ("score",)
    ) -> None:
        if not 0 < level < 1:  # also refuses NaN
            raise ValueError(f"level {level!r}; expected a probability between 0 and 1, e.g. 0.01 for 1 %")
        if not measures:
            raise ValueError("no measures to watch; give the name of at least one, e.g. measures=('score',)")
        self.level, self.seed, self.measures = level, seed, tuple(measures)
        self.calibration_NM = _rows(calibration, len(self.measures), "calibration scores")
        self.warning: Change | None = None
        self._ascending = [Ascending(column) for column in self.calibration_NM.T.tolist()]
        self._earlier = [Ascending() for _ in self.measures]  # the scores of new photographs
        self._wagers: dict[tuple[str, Direction], _Wager] = {
            (measure, direction): _Wager() for measure in self.measures for direction in ("higher", "lower")
        }
        self._scores = array("d")  # in the order of the photographs, M each
        self._peaks: list[float] = []  # the largest log10 of the evidence in each span of `_stride` photographs
        self._stride = 1
        self._rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        """Return the number of photographs, without those that calibrate."""
        return len(self._scores) // len(self.measures)

    def update(self, scores: ArrayLike) -> Change | None:
        """Go on with the scores of B photographs in the order of time, [B] or [B, M], or one number; return `warning`.

        Leave out copies of normal photographs, and those that could not be read. Raises ValueError for NaN or infinite
        values and another shape; then none of the B counts.
        """
        for row in _rows(scores, len(self.measures), "scores").tolist():
            self._go_on(row)
        return self.warning

    @property
    def log10_martingale(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Numbers of photographs, ascending, and the log10 of the evidence: its maximum since the number before.

        At most 1000 of each: neighbours are merged when there are more. The evidence is the largest of the martingales
        divided by how many there are, so that the warning comes when it reaches -log10(level).
        """
        numbers = np.minimum(np.arange(1, len(self._peaks) + 1) * self._stride, len(self))
        return numbers, np.array(self._peaks)

    def state(self) -> dict[str, Any]:
        """Return what `from_state` needs, ready for JSON: all scores, hence 20 bytes of text for each."""
        return {
            "calibration": self.calibration_NM.tolist(),
            "level": self.level,
            "seed": self.seed,
            "measures": list(self.measures),
            "scores": np.array(self._scores).reshape(-1, len(self.measures)).tolist(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Go on where `state` was taken: every photograph counts anew, in the same order (100,000 take seconds)."""
        watch = cls(state["calibration"], state["level"], state["seed"], state["measures"])
        watch.update(state["scores"])
        return watch

    def _go_on(self, row: list[float]) -> None:
        index, tau = len(self), float(self._rng.random())
        for measure, score, normal, earlier in zip(self.measures, row, self._ascending, self._earlier, strict=True):
            above, same = earlier.above(score)
            lower = 1 - (above + tau * (1 + same)) / (1 + len(earlier))
            more_above, more_same = normal.above(score)
            count = 1 + len(earlier) + len(normal)
            higher = (above + more_above + tau * (1 + same + more_same)) / count
            self._wagers[measure, "higher"].play(index, higher)
            self._wagers[measure, "lower"].play(index, lower)
            earlier.insert(score)
        self._scores.extend(row)
        (measure, direction), best = max(self._wagers.items(), key=lambda item: item[1].log_wealth)
        log_evidence = best.log_wealth - math.log(len(self._wagers))
        if self.warning is None and log_evidence >= -math.log(self.level):
            self.warning = Change(best.since, index, measure, direction, self.level)
        self._remember(index, log_evidence / math.log(10))

    def _remember(self, index: int, log10: float) -> None:
        if index % self._stride == 0:
            self._peaks.append(log10)
        else:
            self._peaks[-1] = max(self._peaks[-1], log10)
        if len(self._peaks) == MOST_PEAKS and (index + 1) % self._stride == 0:
            self._peaks = [max(pair) for pair in zip(self._peaks[::2], self._peaks[1::2], strict=True)]
            self._stride *= 2


@dataclass
class _Wager:
    """One martingale: a purse, and a stake on every bet. Logarithms, because wealth may exceed any float."""

    log_stakes: list[float] = field(default_factory=lambda: [-math.inf] * len(POWERS))
    log_products: list[float] = field(default_factory=lambda: [0.0] * len(POWERS))  # of the best start of each bet
    starts: list[int] = field(default_factory=lambda: [0] * len(POWERS))
    log_wealth: float = 0.0

    def play(self, index: int, p_value: float) -> None:
        """Stake a part of the purse, then let every bet win or lose on the p-value of photograph ``index``."""
        log_p, purse = math.log(max(p_value, FLOOR)), _purse(index + 1)
        log_added = math.log((_purse(index) - purse) / len(POWERS))
        self.log_wealth = math.log(purse)
        for bet, power in enumerate(POWERS):
            log_factor = (power - 1) * log_p - _LOG_Z[bet]
            self.log_stakes[bet] = _log_sum(self.log_stakes[bet], log_added) + log_factor
            self.log_wealth = _log_sum(self.log_wealth, self.log_stakes[bet])
            if self.log_products[bet] <= 0:
                self.log_products[bet], self.starts[bet] = 0.0, index
            self.log_products[bet] += log_factor

    @property
    def since(self) -> int:
        """The photograph from which on the best bet has won most."""
        return self.starts[self.log_products.index(max(self.log_products))]


def plot(watch: Watch, width: int = 1000, height: int = 180) -> str:
    """Draw the evidence over the photographs as SVG for a page: the level of a warning, and since when.

    Colours are the page's variables --accent, --bad, --soft and --ink, so that it is readable on light and dark.
    """
    numbers, log10 = watch.log10_martingale
    limit = -math.log10(watch.level)
    low, high = min(-1.0, float(log10.min(initial=0.0))), max(1.5 * limit, float(log10.max(initial=0.0)))

    def across(number: float) -> float:
        return width * number / max(1, len(watch))

    def down(value: float) -> float:
        return height * (high - value) / (high - low)

    points = " ".join(f"{across(n):.1f},{down(v):.1f}" for n, v in zip(numbers, log10, strict=True))
    text = 'style="fill:var(--soft,#596270);font-size:13px"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -16 {width} {height + 36}" role="img" '
        f'aria-label="Evidence that the photographs have changed, over {len(watch)} photographs">',
        f'<line x1="0" x2="{width}" y1="{down(limit):.1f}" y2="{down(limit):.1f}" '
        'style="stroke:var(--ink,#16191f);stroke-width:1.5;stroke-dasharray:6 4"/>',
        f'<text x="4" y="{down(limit) - 5:.1f}" {text}>warning: evidence of {1 / watch.level:.0f} to 1</text>',
        f'<polyline points="0,{down(0):.1f} {points}" '
        'style="fill:none;stroke:var(--accent,#1f5fd0);stroke-width:2;stroke-linejoin:round"/>',
        f'<text x="{width}" y="{height + 16}" text-anchor="end" {text}>{len(watch)} photographs</text>',
    ]
    if watch.warning is not None:
        since, place = watch.warning.since, across(watch.warning.since)
        end, room = ("end", -6) if place > width / 2 else ("start", 6)
        parts += [
            f'<line class="since" x1="{place:.1f}" x2="{place:.1f}" y1="0" y2="{height}" '
            'style="stroke:var(--bad,#c0301c);stroke-width:2"/>',
            f'<text x="{place + room:.1f}" y="-4" text-anchor="{end}" {text}>since about photograph {since + 1}</text>',
        ]
    return "\n".join([*parts, "</svg>"])


def _purse(photographs: int) -> float:
    """Return the share of the wealth that is not yet staked after this number of photographs."""
    return 1 / (1 + math.log1p(photographs))


def _log_sum(a: float, b: float) -> float:
    """log(exp(a) + exp(b)), b finite."""
    low, high = (a, b) if a < b else (b, a)
    return high + math.log1p(math.exp(low - high))


def _rows(scores: ArrayLike, measures: int, name: str) -> NDArray[np.float64]:
    """Return finite scores as rows [B, M]; one number, or a flat list if M = 1, is taken as rows too."""
    array = real_numbers(scores, name).astype(np.float64)
    if array.size == 0 and array.ndim <= 2:
        return array.reshape(0, measures)
    if measures == 1 and array.ndim < 2:
        array = array.reshape(-1, 1)
    if array.ndim != 2 or array.shape[1] != measures:
        raise ValueError(f"{name} have shape {array.shape}; expected [photographs, {measures}], one column per measure")
    return array
