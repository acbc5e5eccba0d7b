"""The watch over a line: against a plain sum over all beginnings of a change, by simulation, and on scores of drawn
tiles and real photographs."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from drawn import tile
from numpy.typing import NDArray
from PIL import Image
from scipy import integrate, stats

from adpretrain.extractor import ADExtractor
from downstream.exchangeability import FLOOR, MOST_PEAKS, POWERS, Watch, plot
from downstream.inspection.inspector import Scored
from downstream.inspection.photos import find_images
from downstream.inspection.set_up import inspector_from_folder

BOTTLES = Path(__file__).parents[3] / "shared" / "data" / "board" / "mvtec_bottle" / "train"


@functools.cache
def integral(power: float) -> float:
    return integrate.quad(lambda x: max(x, FLOOR) ** (power - 1), 0, 1, points=[FLOOR])[0]


def factor(p: float, power: float) -> float:
    """The bet: max(p, FLOOR)^(e - 1), divided by its integral."""
    return max(p, FLOOR) ** (power - 1) / integral(power)


def plain(calibration: NDArray, scores: NDArray, seed: int) -> list[float]:
    """The evidence after each photograph, from the definition: a sum over the photographs at which a stake begins."""
    draws, factors, evidence = np.random.default_rng(seed), {"higher": [], "lower": []}, []
    for t, score in enumerate(scores):
        tau, earlier = draws.random(), scores[:t]
        pool = np.concatenate([calibration, earlier])
        p = ((pool > score).sum() + tau * (1 + (pool == score).sum())) / (1 + len(pool))
        q = ((earlier < score).sum() + (1 - tau) * (1 + (earlier == score).sum())) / (1 + t)
        factors["higher"].append([factor(p, power) for power in POWERS])
        factors["lower"].append([factor(q, power) for power in POWERS])
        purse = 1 / (1 + np.log1p(np.arange(t + 2)))
        wealth = [
            purse[-1] + sum((purse[s] - purse[s + 1]) * np.prod(won[s:], axis=0).mean() for s in range(t + 1))
            for won in factors.values()
        ]
        evidence.append(max(wealth) / 2)
    return evidence


@pytest.mark.parametrize("calibrating", [0, 4, 20])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_the_evidence_is_the_plain_sum(calibrating: int, shift: float) -> None:
    rng = np.random.default_rng(calibrating)
    normal, scores = rng.normal(size=calibrating).round(1), rng.normal(size=60).round(1)  # with ties
    scores[30:] += shift
    watch = Watch(normal, seed=7)
    watch.update(scores)
    numbers, log10 = watch.log10_martingale
    expected = plain(normal, scores, seed=7)
    assert numbers.tolist() == list(range(1, 61))
    np.testing.assert_allclose(10**log10, expected, rtol=1e-9)
    reached = np.flatnonzero(np.array(expected) >= 100)
    if not shift:
        assert watch.warning is None
    else:
        assert watch.warning is not None
        assert watch.warning.at == reached[0]
        assert watch.warning.direction == ("higher" if shift > 0 else "lower")


def lives(
    count: int, photographs: int, scores: Callable[[np.random.Generator, int], NDArray], normals: int
) -> list[Watch]:
    """Watches over ``count`` lines with normal calibration scores; ``scores`` draws those of the photographs."""
    watches = []
    for life in range(count):
        rng = np.random.default_rng((normals, life))
        watch = Watch(rng.normal(size=normals), seed=life)
        watch.update(scores(rng, photographs))
        watches.append(watch)
    return watches


def unchanged(rng: np.random.Generator, photographs: int) -> NDArray:
    return rng.normal(size=photographs)


def warned(watches: list[Watch]) -> int:
    return sum(watch.warning is not None for watch in watches)


def most_allowed(count: int, level: float = 0.01) -> float:
    return float(stats.binom.ppf(0.9999, count, level))


@pytest.mark.parametrize("normals", [8, 20, 100])
def test_a_line_that_does_not_change_is_seldom_warned_of(normals: int) -> None:
    assert warned(lives(300, 300, unchanged, normals)) <= most_allowed(300)


@pytest.mark.long
@pytest.mark.parametrize(("normals", "count"), [(8, 10_000), (4, 1000), (20, 1000), (100, 1000)])
def test_false_warnings_of_ten_thousand_lives(normals: int, count: int) -> None:
    found = warned(lives(count, 300, unchanged, normals))
    print(f"{normals} normals: {found} false warnings in {count} lives of 300 photographs")
    assert found <= most_allowed(count)


@pytest.mark.long
def test_a_long_life_keeps_the_level() -> None:
    found = warned(lives(30, 10_000, unchanged, 20))
    print(f"{found} false warnings in 30 lives of 10,000 photographs")
    assert found <= most_allowed(30)


def test_scores_with_many_ties_keep_the_level() -> None:
    count = 400
    found = 0
    for life in range(count):
        rng = np.random.default_rng(life)
        found += Watch(rng.integers(3, size=10), seed=life).update(rng.integers(3, size=200)) is not None
    assert found <= most_allowed(count)


def test_p_values_among_the_calibration_alone_would_warn_too_often() -> None:
    """Why each photograph is ranked among the earlier ones too: one power, bet from the start, on plain p-values."""
    count, normals = 400, 8
    rng, found = np.random.default_rng(0), 0
    for _ in range(count):
        normal, scores = rng.normal(size=normals), rng.normal(size=300)
        above = (normal[None] > scores[:, None]).sum(1)
        p_values = (above + rng.random(300)) / (normals + 1)
        growth = np.cumsum([np.log(factor(p, 0.6)) for p in p_values])
        found += growth.max() >= np.log(100)
    assert found > 5 * most_allowed(count)


def test_references_scored_against_each_other_warn_no_more_than_the_level() -> None:
    """Leave-one-out scores (distances to the nearest of n - 1) tend to lie above those of new photographs."""
    count, found, below = 300, 0, []
    for life in range(count):
        rng = np.random.default_rng(life)
        references, new = rng.normal(size=(20, 10)), rng.normal(size=(200, 10))
        among = np.linalg.norm(references[:, None] - references, axis=-1) + np.diag(np.full(20, np.inf))
        scores = np.linalg.norm(new[:, None] - references, axis=-1).min(1)
        below.append(np.median(among.min(1)) - np.median(scores))
        found += Watch(among.min(1), seed=life).update(scores) is not None
    assert np.mean(below) > 0
    assert found <= most_allowed(count)


@pytest.mark.parametrize(("shift", "most"), [(1.0, 60), (2.0, 18), (4.0, 12), (-2.0, 20)])
def test_a_change_is_found_and_dated(shift: float, most: int) -> None:
    """20 normals, 60 goods, then a shift by so many standard deviations."""

    def shifted(rng: np.random.Generator, photographs: int) -> NDArray:
        return rng.normal(size=photographs) + shift * (np.arange(photographs) >= 60)

    found = [watch.warning for watch in lives(60, 160, shifted, 20)]
    changes = [change for change in found if change is not None and change.at >= 60]
    delays = [change.at - 59 for change in changes] + [999] * (60 - len(changes))
    print(f"shift {shift}: delays {np.percentile(delays, [10, 50, 90])}")
    assert np.median(delays) <= most
    assert sum(change.direction == ("higher" if shift > 0 else "lower") for change in changes) >= 0.9 * len(changes)
    assert np.median([abs(change.since - 60) for change in changes]) <= 8 / abs(shift)


@pytest.mark.long
def test_bad_parts_among_the_goods() -> None:
    """2 % of parts with scores above all others, in 300 lives of 1000 photographs; and several in a row."""

    def some_bad(rng: np.random.Generator, photographs: int) -> NDArray:
        return rng.normal(size=photographs) + 100 * (rng.random(photographs) < 0.02)

    shares = [warned(lives(300, 1000, some_bad, normals)) / 300 for normals in (8, 20, 100)]
    print("2 % bad parts, 8, 20 and 100 normals:", shares)
    assert max(shares) <= 0.05  # of 2000 lives, 0.8, 0.8 and 1.4 %
    for bad in (3, 5, 8):

        def in_a_row(rng: np.random.Generator, photographs: int, bad: int = bad) -> NDArray:
            place = np.arange(photographs)
            return rng.normal(size=photographs) + 100 * ((place >= 60) & (place < 60 + bad))

        share = warned(lives(1000, 100, in_a_row, 20)) / 1000
        print(f"{bad} bad parts in a row: {share}")
        assert bad == 8 or share <= 0.05


def test_two_measures_share_the_level_and_say_which_has_changed() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(100, 2))
    scores[50:, 1] += 4
    watch = Watch(rng.normal(size=(20, 2)), measures=("score", "unlike value"))
    change = watch.update(scores)
    assert change is not None
    assert (change.measure, change.direction) == ("unlike value", "higher")
    assert abs(change.since - 50) <= 2
    alone = Watch(watch.calibration_NM[:, 1]).update(scores[:, 1])
    assert alone is not None
    assert alone.at <= change.at  # half the level is left for each
    words = change.in_words(at="c.png")
    assert f"Since about photograph {change.since + 1} the" in words
    assert "unlike value is higher (found at c.png;" in words
    words_first = dataclasses.replace(change, since=0).in_words("a.png", "c.png")
    assert words_first.startswith("From the first one on, a.png, the photographs do not look like the normal ones: ")
    assert "at most 1 % over" in words


def test_a_watch_goes_on_where_it_was_interrupted() -> None:
    rng = np.random.default_rng(1)
    normal, scores = rng.normal(size=(8, 2)).round(1), rng.normal(size=(2600, 2)).round(1)
    scores[2000:] += 1.5
    whole, pieces = Watch(normal, seed=3, measures=("a", "b")), Watch(normal, seed=3, measures=("a", "b"))
    whole.update(scores)
    for part in np.array_split(scores, 7):
        pieces = Watch.from_state(json.loads(json.dumps(pieces.state())))
        pieces.update(part)
    assert whole.warning is not None
    assert pieces.warning == whole.warning
    assert json.dumps(pieces.state()) == json.dumps(whole.state())
    assert plot(pieces) == plot(whole)
    other = Watch(normal, seed=4, measures=("a", "b"))
    other.update(scores)
    assert plot(other) != plot(whole)  # ties are broken otherwise


def test_a_long_history_keeps_its_peaks() -> None:
    rng, photographs = np.random.default_rng(0), 5000
    scores = rng.normal(size=photographs)
    scores[3000:3020] += 5
    watch, each = Watch(rng.normal(size=20)), []
    for start in range(0, photographs, 500):
        watch.update(scores[start : start + 500])
    again = Watch(watch.calibration_NM)
    for score in scores:
        again.update(score)
        each.append(again.log10_martingale[1][-1])
    numbers, log10 = watch.log10_martingale
    assert len(log10) <= MOST_PEAKS
    assert numbers[-1] == photographs
    np.testing.assert_array_equal(again.log10_martingale[1], log10)
    assert log10.max() == max(each)
    assert 3000 < numbers[log10.argmax()] <= 3050  # noise may add a little to it after the last of the 20


def test_the_plot_shows_the_level_and_since_when() -> None:
    rng = np.random.default_rng(0)
    watch = Watch(rng.normal(size=20))
    watch.update(rng.normal(size=60))
    assert not ElementTree.fromstring(plot(watch)).findall(".//*[@class='since']")
    watch.update(rng.normal(size=60) + 4)
    assert watch.warning is not None
    drawing = ElementTree.fromstring(plot(watch))
    (line,) = drawing.findall(".//*[@class='since']")
    assert float(line.get("x1", "")) == pytest.approx(1000 * watch.warning.since / 120, abs=0.1)
    assert f"since about photograph {watch.warning.since + 1}" in plot(watch)
    curve = drawing.find("{*}polyline")
    level = drawing.find("{*}line")
    assert curve is not None
    assert level is not None
    heights = [float(point.partition(",")[2]) for point in curve.get("points", "").split()][1:]
    above = np.flatnonzero(np.array(heights) < float(level.get("y1", "")))  # y grows downwards
    assert above[0] == watch.warning.at
    ElementTree.fromstring(plot(Watch([])))  # before the first photograph


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="level 1; expected a probability"):
        Watch([1.0], level=1)
    with pytest.raises(ValueError, match="no measures"):
        Watch([1.0], measures=())
    watch = Watch([[1.0, 2.0]], measures=("a", "b"))
    with pytest.raises(ValueError, match=r"scores have shape \(3,\); expected \[photographs, 2\]"):
        watch.update([1, 2, 3])
    with pytest.raises(ValueError, match="NaN"):
        watch.update([[1, 2], [np.nan, 1]])
    assert len(watch) == 0


def brighter(photo: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(photo, dtype=float) * 1.15).clip(0, 255).astype(np.uint8))


def watch_of(folder: Path, photos: list[Image.Image]) -> Watch:
    """Inspect with the embedded extractor: 20 normals, 60 goods, and the rest 15 % brighter; both measures."""
    folders = {"normal": photos[:20], "new": [*photos[20:80], *map(brighter, photos[80:])]}
    for name, some in folders.items():
        (folder / name).mkdir()
        for index, photo in enumerate(some):
            photo.save(folder / name / f"{index:03}.png")
    device = torch.device("cpu")
    inspector = inspector_from_folder(ADExtractor.from_pretrained("embedded", device), device, folder / "normal")
    calibration = inspector.calibration
    assert calibration is not None
    watch = Watch(np.column_stack([calibration.scores, calibration.unlike]), measures=("score", "unlike value"), seed=0)
    for batch in inspector.reader.batches(find_images(folder / "new")):
        found = [item for item in inspector.score(batch) if isinstance(item, Scored)]
        watch.update([[item.score, item.unlike.values[0]] for item in found])
    return watch


@pytest.mark.slow
@pytest.mark.parametrize("real", [False, True])
def test_more_light_is_found_within_30_photographs(real: bool, tmp_path: Path) -> None:
    photos = [tile(seed) for seed in range(110)]
    if real:
        paths = sorted(path for path in BOTTLES.rglob("*") if path.is_file())
        if not paths:
            pytest.skip("the real photographs are not here")
        order = np.random.default_rng(0).permutation(len(paths))[:110]
        photos = [Image.open(paths[index]).convert("RGB") for index in order]
    change = watch_of(tmp_path, photos).warning
    assert change is not None
    print(f"found after {change.at - 59} photographs, since {change.since}, {change.measure} {change.direction}")
    assert 60 <= change.at < 90
    assert abs(change.since - 60) <= 3
