"""An ensemble of detectors: their scores are standardised to one unit and averaged (ReConPatch Sec. 3.3).

Eq. 11 is the modified z-score (s - median) / (1.4826 MAD), with the median and MAD of the training images' scores. The
paper calls MAD the mean absolute deviation. We compute the *median* absolute deviation, because times 1.4826 it equals
the standard deviation of normally distributed scores.

Eq. 11 is applied twice: to image scores with the statistics of the training images' scores, and to maps with those of
the training images' pixels, so that detectors of any kind can be combined.

By name (`adpretrain fit --detector ensemble`, `recipes/evaluate.py`) the members are those of the paper unless the
options list others: ReConPatch on WideResNet-101, ResNeXt-101 and DenseNet-201, stages 2 and 3, 3 x 3 patches.

The memory of a member was chosen from patches of the training images too, so that their scores are lower than those of
new normal images. Do not derive a threshold from them.

Shapes: n training images, M members, B images, S side in pixels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from adpretrain.backbones import Backbone, Extract, load_backbone
from adpretrain.progress import Progress
from downstream.detector import Detector, Prediction
from downstream.detectors import build_detector, detector_from_pretrained, merged
from downstream.detectors.reconpatch import ENSEMBLE_320
from downstream.extracts import Adapted, device_of
from downstream.roi import RegionOfInterest
from downstream.saved import Loaded

CONSISTENCY = 1.4826  # 1 / the 75 % quantile of the standard normal distribution
PIXEL_STEP = 4  # every fourth pixel in both directions is enough, because maps are smoothed more widely


NETWORKS = ("timm/wide_resnet101_2.tv_in1k", "timm/resnext101_32x8d.tv_in1k", "timm/densenet201.tv_in1k")


@dataclass(frozen=True)
class MemberConfig:
    """One member of an ensemble.

    Args:
        detector: name of the detector.
        options: options that override the detector's defaults.
        backbone: backbone of this member, which gets the ensemble's images resized and normalised for it
            (`downstream.extracts.Adapted`); null = the features that the ensemble is given.
        levels, image_size, weights: arguments of `load_backbone` for this backbone; image_size null = as the ensemble.
    """

    detector: str = "reconpatch"
    options: dict[str, Any] = field(default_factory=dict)
    backbone: str | None = None
    levels: list[int] | None = None
    image_size: int | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        own = [name for name in ("levels", "image_size", "weights") if getattr(self, name) is not None]
        if own and self.backbone is None:
            raise ValueError(f"a member's {' and '.join(own)} belong to its backbone: name the backbone too")


def _members() -> list[MemberConfig]:
    return [MemberConfig("reconpatch", dataclasses.asdict(ENSEMBLE_320), network) for network in NETWORKS]


@dataclass(frozen=True)
class EnsembleConfig:
    """Options of an `Ensemble` that is built by name.

    Args:
        members: by default the three of the paper. Their photographs are prepared like those of the ensemble's
            backbone (the paper resizes to 366 pixels and crops to 320; `--image-size 320` resizes the whole to 320).
        options: options that override those of every member, such as {training: {epochs: 10}}. For 480 pixels the paper
            uses `downstream.detectors.reconpatch.ENSEMBLE_480`: 512 channels, 5 x 5 patches, 120 epochs.
    """

    members: list[MemberConfig] = field(default_factory=_members)
    options: dict[str, Any] = field(default_factory=dict)


DEFAULT = EnsembleConfig()


@functools.lru_cache(maxsize=8)
def _network(
    name: str, image_size: int, levels: tuple[int, ...] | None, weights: str | None, device: torch.device
) -> Backbone:
    """Load a network once: frozen networks can be shared, and an evaluation builds an ensemble for every product."""
    return load_backbone(name, weights=weights, image_size=image_size, levels=levels).to(device)


def build_member(extract: Extract, config: MemberConfig, shared: dict[str, Any]) -> Detector:
    """Make an unfitted member on its own backbone, or on ``extract``. ``shared`` holds options for every member.

    Raises ValueError if the member has its own backbone but ``extract`` is not a raw backbone.
    """
    options = merged(config.options, shared)
    if config.backbone is not None:
        if not isinstance(extract, Backbone):
            raise ValueError(
                f"a member of the ensemble has its own backbone, {config.backbone}, and would not use the features of "
                "the extractor: give the ensemble a raw backbone, or members without backbones"
            )
        images, levels = extract.preprocess, None if config.levels is None else tuple(config.levels)
        size = config.image_size or images.image_size
        extract = Adapted(_network(config.backbone, size, levels, config.weights, device_of(extract)), images)
    return build_detector(config.detector, extract, options)


@dataclass(frozen=True)
class ScoreUnit:
    """Location and spread of normal scores; ``mad`` is their median absolute deviation from the median."""

    median: float
    mad: float

    @classmethod
    def of(cls, scores: Tensor) -> ScoreUnit:
        """Compute it from scores of any shape, in float64. Raises ValueError if one is not finite or half are equal."""
        values = scores.detach().cpu().double().numpy()
        if values.size == 0 or not np.isfinite(values).all():
            raise ValueError(f"{values.size} training scores, none or not all of them finite: there is no median")
        median = float(np.median(values))
        mad = float(np.median(np.abs(values - median)))
        if mad == 0:
            raise ValueError(
                f"half of the training scores, or more, equal {median}: they cannot be standardised. If the memory "
                "holds every training patch, choose a smaller coreset"
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

    @classmethod
    def of_numbers(cls, numbers: Sequence[float], side: int) -> Units:
        """Restore the units from saved `numbers`."""
        median, mad, pixel_median, pixel_mad = numbers
        return cls(ScoreUnit(median, mad), ScoreUnit(pixel_median, pixel_mad), side)

    @property
    def numbers(self) -> tuple[float, float, float, float]:
        """Median and MAD of scores and pixels."""
        return self.scores.median, self.scores.mad, self.pixels.median, self.pixels.mad


def training_units(detector: Detector, batches: Iterable[Tensor], roi: Tensor | None = None) -> Units:
    """Compute the units of a fitted detector's scores and maps from the images it was fitted on, in their region of
    interest ``roi``."""
    scores, pixels, side, count = [], [], 0, 0
    for images in batches:
        batch_roi = None if roi is None else RegionOfInterest(roi).pick(range(count, count + len(images))).roi
        prediction = detector.predict(images, batch_roi)
        count += len(images)
        scores.append(prediction.scores.flatten())
        some = prediction.maps[:, ::PIXEL_STEP, ::PIXEL_STEP].flatten()
        pixels.append(some if roi is None else some[~some.isnan()])
        side = int(prediction.maps.shape[2])
    if not scores:
        raise ValueError("no training images to take the unit of scores from: batches is empty")
    return Units(ScoreUnit.of(torch.cat(scores)), ScoreUnit.of(torch.cat(pixels)), side)


class Ensemble(Detector):
    """The mean of the members' standardised scores and maps.

    All members get the same images, so their networks must need the same preprocessing. `fit` fits them one after the
    other; members with the same extract compute its features separately.
    """

    name = "ensemble"
    options = None  # an ensemble is described by its members alone
    load_member = staticmethod(detector_from_pretrained)

    def __init__(self, members: Sequence[Detector]) -> None:
        if not members:
            raise ValueError("an ensemble needs detectors: give at least one")
        self.members = list(members)
        self._units: list[Units] = []

    @classmethod
    def of(cls, extract: Extract, config: EnsembleConfig) -> Self:
        """Make an ensemble of unfitted members; those without their own backbone use ``extract``."""
        return cls([build_member(extract, member, config.options) for member in config.members])

    def fit(
        self, normal_batches: Iterable[Tensor], progress: Progress | None = None, roi: Tensor | None = None
    ) -> Self:
        """Fit every member, then score the same images to get its units: 2 M passes over batches [b, 3, S, S].

        ``roi``: as in `Detector.fit`. The images of an iterator, which can be read only once, are kept in memory.
        Raises the errors of the members, and ValueError if half of a member's training scores are equal.
        """
        self.keep_roi(roi)
        batches = list(normal_batches) if iter(normal_batches) is normal_batches else normal_batches
        units = []
        for number, member in enumerate(self.members):
            member.fit(batches, progress, roi)
            try:
                units.append(training_units(member, batches, roi))
            except ValueError as error:
                raise ValueError(f"member {number} of the ensemble: {error}") from error
        self._units, self.side = units, units[0].side
        return self

    def predict(self, images: Tensor, roi: Tensor | None = None) -> Prediction:
        """[B, 3, S, S] -> scores [B], maps [B, S, S], as z-scores relative to normal images. ``roi`` and errors as in
        `Detector.predict`."""
        self.check_fitted()
        return self.from_members(images, [member.predict(images, roi) for member in self.members])

    def from_members(
        self, images: Tensor, predictions: Sequence[Prediction], region: RegionOfInterest | None = None
    ) -> Prediction:
        """The members' predictions know the region."""
        scores, maps = [], []
        for prediction, units in zip(predictions, self._units, strict=True):
            scores.append(units.scores.standard(prediction.scores))
            maps.append(units.pixels.standard(prediction.maps))
        return Prediction(torch.stack(scores).mean(0), torch.stack(maps).mean(0))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the units of the members."""
        return {"units": torch.tensor([units.numbers for units in self._units], dtype=torch.float64)}, {}

    @classmethod
    def _unfitted(cls, loaded: Loaded) -> Self:
        return cls(loaded.members)

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        self._units = [Units.of_numbers(numbers, self.side) for numbers in tensors["units"].tolist()]
        if len(self._units) != len(self.members):
            raise ValueError(f"there are {len(self.members)} members, but units of {len(self._units)}")
