"""What is compared: detectors on features. "With" and "without" pretraining differ in one argument, the `Extract`.

raw          the backbone's own features, without references
residual     feature minus nearest reference, nothing learnt
scaled       residuals over the local scale (extractors that have one)
pretrained   the extractor's features
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from adpretrain.backbones import Backbone
from adpretrain.extractor import ADExtractor
from downstream.detectors import DETECTORS
from downstream.detectors.aligned import AlignedFeatureNorm
from downstream.evaluation.few_shot import same_residuals
from downstream.evaluation.withheld import Withheld

Kind = Literal["raw", "residual", "scaled", "pretrained"]
FEATURES: tuple[str, ...] = get_args(Kind)
RAW, RESIDUAL, SCALED, PRETRAINED = FEATURES
ALIGNED = AlignedFeatureNorm.name


@dataclass(frozen=True)
class Contender:
    """A row of the table. ``extractor`` numbers the extractors that are averaged; 0 for features that need none."""

    detector: str
    features: str
    extractor: int = 0

    def __str__(self) -> str:
        return f"{self.detector} on {self.features}"


@dataclass(frozen=True)
class Networks:
    """The backbone, and the extractors on it (seeds of one training, averaged; perhaps none)."""

    backbone: Backbone
    extractors: tuple[ADExtractor, ...] = ()

    def __post_init__(self) -> None:
        for number, extractor in enumerate(self.extractors):
            if not same_residuals(self.extractors[0], extractor):
                raise ValueError(f"extractor {number} and extractor 0 are not seeds of one training: score them apart")

    def extract(self, contender: Contender) -> Backbone | ADExtractor | Withheld:
        """The features of a contender; all but raw ones wait for their references, unless the detector chooses them."""
        if contender.features == RAW:
            return self.backbone
        if not self.extractors:
            extractor = ADExtractor(self.backbone)
        elif contender.features == RESIDUAL:
            extractor = ADExtractor(self.backbone, matching=self.extractors[0].config.matching)
        elif contender.features == SCALED:
            extractor = self.extractors[0].without_projector()
        else:
            extractor = self.extractors[contender.extractor]
        return extractor if contender.detector == ALIGNED else Withheld(extractor)


def contenders(detectors: Sequence[str], features: Sequence[str], networks: Networks) -> list[Contender]:
    """Every detector on every kind of features, and on every extractor. Raises ValueError for what there is not.

    Aligned references need an extractor: that detector has no row for raw features.
    """
    if not detectors:
        raise ValueError(f"no detectors to compare; choose from {', '.join(DETECTORS)}")
    if unknown := [name for name in detectors if name not in DETECTORS]:
        raise ValueError(f"detectors {unknown} are unknown; choose from {', '.join(DETECTORS)}")
    if unknown := [name for name in features if name not in FEATURES]:
        raise ValueError(f"features {unknown} are unknown; choose from {', '.join(FEATURES)}")
    if PRETRAINED in features and not networks.extractors:
        raise ValueError(f"features {PRETRAINED!r} need an extractor on that backbone: give --extractors")
    if SCALED in features and not (networks.extractors and networks.extractors[0].local_scale):
        raise ValueError("features 'scaled' need an extractor with a local scale")
    counts = {name: len(networks.extractors) if name == PRETRAINED else 1 for name in features}
    return [
        Contender(detector, name, number)
        for detector in dict.fromkeys(detectors)
        for name in dict.fromkeys(features)
        for number in range(counts[name])
        if (detector, name) != (ALIGNED, RAW)
    ]
