"""Several detectors as one: their scores in one unit, then the mean (ReConPatch Sec. 3.3).

Eq. 11, the modified z-score: (s - median) / (1.4826 MAD), with the median and MAD of the training images' scores. The
paper calls MAD the mean absolute deviation; but 1.4826 belongs to the *median* absolute deviation, which it makes the
standard deviation of normally distributed scores, and that is what is computed.

Eq. 11 is applied twice: to image scores with the statistics of the training images' scores, and to maps with those of
the training images' pixels, so that detectors of any kind can be joined.

A training image meets a memory that was chosen from its own patches, among others: its scores are lower than those of
a new normal image, in every member. No threshold may be read off them.

Shapes: n training images, M members, B images, S side in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from downstream.composite import Composite, LoadedComposite, save_composite
from downstream.detector import Detector, Prediction, not_fitted

CONSISTENCY = 1.4826  # 1 / the 75 % quantile of the standard normal distribution
PIXEL_STEP = 4  # every fourth pixel in both directions says enough: maps are smoothed over more than that


@dataclass(frozen=True)
class ScoreUnit:
    """Where normal scores lie and how far they spread; ``mad`` is the median absolute deviation from the median."""

    median: float
    mad: float

    @classmethod
    def of(cls, scores: Tensor) -> ScoreUnit:
        """From scores of any shape, in float64. Raises ValueError if one is not finite, or half of them are equal."""
        values = scores.detach().cpu().double().numpy()
        if values.size == 0 or not np.isfinite(values).all():
            raise ValueError(f"{values.size} training scores, or not all of them finite: there is no median")
        median = float(np.median(values))
        mad = float(np.median(np.abs(values - median)))
        if mad == 0:
            raise ValueError(
                f"half of the training scores, or more, equal {median}: there is no unit. If the memory holds every "
                "training patch, choose a smaller coreset"
            )
        return cls(median, mad)

    def standard(self, scores: Tensor) -> Tensor:
        """Eq. 11: scores of any shape -> modified z-scores."""
        return (scores - self.median) / (CONSISTENCY * self.mad)


@dataclass(frozen=True)
class Units:
    """The units of image scores and of map pixels, and the side of the maps."""

    scores: ScoreUnit
    pixels: ScoreUnit
    side: int


def training_units(detector: Detector, batches: Iterable[Tensor]) -> Units:
    """The units of a fitted detector's scores and maps on the images it was fitted on."""
    scores, pixels, side = [], [], 0
    for images in batches:
        prediction = detector.predict(images)
        scores.append(prediction.scores.flatten())
        pixels.append(prediction.maps[:, ::PIXEL_STEP, ::PIXEL_STEP].flatten())
        side = int(prediction.maps.shape[2])
    return Units(ScoreUnit.of(torch.cat(scores)), ScoreUnit.of(torch.cat(pixels)), side)


class Ensemble(Composite):
    """The mean of the members' standardised scores and maps.

    All members see the same images, so their networks must want them prepared alike. `fit` fits them one after the
    other; members that share an extract do not share its work.
    """

    saved_as = "ensemble"

    def __init__(self, members: Sequence[Detector]) -> None:
        if not members:
            raise ValueError("an ensemble of no detectors: give at least one")
        self.members = list(members)
        self._units: list[Units] = []

    def fit(self, normal_batches: Iterable[Tensor]) -> Self:
        """Fit every member, then score the same images for their units: 2 M passes over batches [b, 3, S, S].

        An iterator that can be read only once is kept in memory. Raises ValueError as the members do, and if half of a
        member's training scores are equal.
        """
        batches = list(normal_batches) if iter(normal_batches) is normal_batches else normal_batches
        units = []
        for number, member in enumerate(self.members):
            member.fit(batches)
            try:
                units.append(training_units(member, batches))
            except ValueError as error:
                raise ValueError(f"member {number} of the ensemble: {error}") from error
        self._units = units
        return self

    def predict(self, images: Tensor) -> Prediction:
        """[B, 3, S, S] -> scores [B], maps [B, S, S], in units of a normal score's spread. Raises ValueError before
        `fit`."""
        if not self._units:
            raise not_fitted(self)
        scores, maps = [], []
        for member, units in zip(self.members, self._units, strict=True):
            prediction = member.predict(images)
            scores.append(units.scores.standard(prediction.scores))
            maps.append(units.pixels.standard(prediction.maps))
        return Prediction(torch.stack(scores).mean(0), torch.stack(maps).mean(0))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write all fitted members, FEATURES OF THE PRODUCT among them (`downstream.saving`), and their units.

        Raises ValueError before `fit`, if ``folder`` holds other files, or if a member cannot be saved.
        """
        if not self._units:
            raise not_fitted(self)
        rows = [(u.scores.median, u.scores.mad, u.pixels.median, u.pixels.mad) for u in self._units]
        tensors = {"units": torch.tensor(rows, dtype=torch.float64)}
        return save_composite(folder, self.saved_as, None, self.members, tensors, self._units[0].side)

    @classmethod
    def _restored(cls, loaded: LoadedComposite) -> Self:
        ensemble = cls(loaded.members)
        for median, mad, pixel_median, pixel_mad in loaded.tensors["units"].tolist():
            units = Units(ScoreUnit(median, mad), ScoreUnit(pixel_median, pixel_mad), loaded.config.image_size)
            ensemble._units.append(units)
        if len(ensemble._units) != len(loaded.members):
            raise ValueError(f"{len(loaded.members)} members and units of {len(ensemble._units)}")
        return ensemble
