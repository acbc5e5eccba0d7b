"""Scores in one unit: against SciPy, and what it does for members whose units differ.

Shapes: B images, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch
from scipy.stats import median_abs_deviation
from torch import Tensor

from downstream.detectors.ensemble import CONSISTENCY, Ensemble, ScoreUnit, training_units
from downstream.detectors.featurenorm import FeatureNorm, FeatureNormConfig
from downstream.metrics import auroc

SIZE = 16


@pytest.mark.parametrize("count", [4, 5, 101])
def test_modified_z_score_equals_scipy(count: int) -> None:
    scores = np.random.default_rng(count).gamma(2.0, size=count)
    unit = ScoreUnit.of(torch.from_numpy(scores))
    new = np.linspace(-1, 9, 7)
    expected = (new - np.median(scores)) / (1.4826 * median_abs_deviation(scores))
    np.testing.assert_allclose(unit.standard(torch.from_numpy(new)).numpy(), expected, rtol=1e-12)
    assert median_abs_deviation(scores, scale="normal") == pytest.approx(CONSISTENCY * unit.mad, rel=1e-4)


def test_normal_scores_become_standard_normal() -> None:
    scores = 40 + 7 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    standard = ScoreUnit.of(scores).standard(scores)
    assert standard.std().item() == pytest.approx(1.0, abs=0.02)
    assert standard.median().item() == pytest.approx(0.0, abs=1e-5)
    # The mean absolute deviation, which the paper's words name, would give 0.845 here.


def test_a_few_outliers_do_not_move_the_unit() -> None:
    scores = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    spoilt = scores.clone()
    spoilt[:20] = 1e6
    clean, dirty = ScoreUnit.of(scores), ScoreUnit.of(spoilt)
    assert dirty.mad == pytest.approx(clean.mad, rel=0.06)
    assert dirty.median == pytest.approx(clean.median, abs=0.06)


class Channel(FeatureNorm):
    """A real, small detector: how far one colour is from its mean over the normal images, in a unit of its own."""

    def __init__(self, channel: int, unit: float) -> None:
        config = FeatureNormConfig(SIZE, sigma=1.0, top=0)
        super().__init__(lambda images: [unit * (images - self.mean)[:, channel : channel + 1]], config)
        self.mean = torch.zeros(3, SIZE, SIZE)
        self.images = 0

    def fit(self, normal_batches: Iterable[Tensor], progress: object = None, roi: Tensor | None = None) -> Channel:
        images = torch.cat(list(normal_batches))
        self.mean, self.images = images.mean(0), len(images)
        return self


def photographs(count: int, seed: int, defect: int | None = None) -> Tensor:
    """Noise; a defect is a spot in one of the first two colours."""
    images = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    if defect is not None:
        images[:, defect, 4:8, 4:8] += 2.0
    return images


def test_members_count_alike_whatever_their_units() -> None:
    train = photographs(40, 0).split(16)
    test = torch.cat([photographs(40, 1), photographs(20, 2, defect=0), photographs(20, 3, defect=1)])
    labels = np.repeat([0, 1], 40)

    def image_auroc(detector: FeatureNorm | Ensemble) -> float:
        return auroc(detector.fit(train).predict(test).scores.numpy(), labels)

    small, large = Channel(0, 1e-3), Channel(1, 1e3)
    joined = image_auroc(Ensemble([small, large]))
    assert joined > max(image_auroc(small), image_auroc(large)) + 0.1
    assert image_auroc(Ensemble([Channel(0, 1.0), Channel(1, 1.0)])) == pytest.approx(joined, abs=1e-6)


def test_scores_and_maps_are_the_mean_of_eq_11() -> None:
    train, test = list(photographs(12, 0).split(5)), photographs(3, 4)
    members = [Channel(0, 1.0), Channel(1, 50.0)]
    prediction = Ensemble(members).fit(train).predict(test)
    scores, maps = np.zeros(3), np.zeros((3, SIZE, SIZE))
    for member in members:
        known = [member.predict(batch) for batch in train]
        own = member.predict(test)
        for total, values, new in (
            (scores, np.concatenate([p.scores.numpy() for p in known]), own.scores.numpy()),
            (maps, np.concatenate([p.maps[:, ::4, ::4].numpy().ravel() for p in known]), own.maps.numpy()),
        ):
            total += (new - np.median(values)) / (1.4826 * median_abs_deviation(values)) / 2
    np.testing.assert_allclose(prediction.scores.numpy(), scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(prediction.maps.numpy(), maps, rtol=1e-4, atol=1e-5)


def test_an_iterator_is_read_once_for_all() -> None:
    def batches() -> Iterator[Tensor]:
        yield from photographs(9, 0).split(4)

    members = [Channel(0, 1.0), Channel(1, 1.0)]
    Ensemble(members).fit(batches())
    assert [member.images for member in members] == [9, 9]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="an ensemble needs detectors"):
        Ensemble([])
    with pytest.raises(ValueError, match="not fitted"):
        Ensemble([Channel(0, 1.0)]).predict(photographs(1, 0))
    flat = [torch.zeros(4, 3, SIZE, SIZE)]
    with pytest.raises(ValueError, match=r"member 1 of the ensemble: half of the training scores, or more, equal 0.0"):
        Ensemble([Channel(0, 1.0), Channel(1, 0.0)]).fit(list(photographs(8, 0).split(4)))
    with pytest.raises(ValueError, match="choose a smaller coreset"):
        training_units(Channel(0, 1.0).fit(flat), flat)
    with pytest.raises(ValueError, match="not all of them finite"):
        ScoreUnit.of(torch.tensor([1.0, torch.nan]))
