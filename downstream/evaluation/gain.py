"""What a projector gains over its own residuals on products that it was not trained on, and how far that scatters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adpretrain.data import Sample
from adpretrain.data.products import draw_shots, product_of
from adpretrain.extractor import ADExtractor
from adpretrain.progress import Progress
from adpretrain.saved import place
from downstream.evaluation.few_shot import encode_samples, measure, score
from downstream.terminal import no_progress

METRICS = ("image_auroc", "aupro")
LEAST = 0.001  # a smaller gain is none, however little it scatters


@dataclass(frozen=True)
class Gain:
    """Image AUROC and AUPRO (nan without masks) of FeatureNorm with and without the projector, each a list over draws
    of references, of one product."""

    product: str
    with_projector: dict[str, list[float]]
    without: dict[str, list[float]]

    def per_draw(self) -> list[float]:
        """The gain of each draw: the mean over the metrics that the product defines."""
        gains = np.array([np.subtract(self.with_projector[name], self.without[name]) for name in METRICS])
        return [float(value) for value in np.nanmean(gains, 0)]


@dataclass(frozen=True)
class Gains:
    """The gains of all products. The projector is ``better`` if its mean gain is at least a tenth of a point and larger
    than the spread: the standard deviation, over draws of references, of the mean over products."""

    products: tuple[Gain, ...]

    @property
    def gain(self) -> float:
        return float(np.mean(self._means()))

    @property
    def spread(self) -> float:
        return float(np.std(self._means(), ddof=1))

    @property
    def better(self) -> bool:
        return self.gain > max(self.spread, LEAST)

    def _means(self) -> np.ndarray:
        return np.mean([gain.per_draw() for gain in self.products], 0)

    def mean(self, name: str, projected: bool) -> float:
        """A metric, averaged over draws and products that define it; nan if none does."""
        values = [(gain.with_projector if projected else gain.without)[name] for gain in self.products]
        known = [value for row in values for value in row if not math.isnan(value)]
        return float(np.mean(known)) if known else math.nan


def compare(
    extractor: ADExtractor,
    products: Sequence[Sequence[Sample]],
    shots: int,
    draws: int = 5,
    progress: Progress = no_progress,
) -> Gains:
    """Compare an extractor with itself without its projector on ``products`` (each one product and view), with the same
    ``draws`` of ``shots`` references for both. Raises ValueError as `draw_shots` does, or for fewer than two draws."""
    if draws < 2:
        raise ValueError(f"draws {draws}: a spread needs at least 2")
    pair, gains = [extractor, extractor.without_projector()], []
    for number, samples in enumerate(products):
        progress("comparing", number, len(products))
        images = encode_samples(samples, extractor.backbone, place(extractor.backbone))
        rows: list[dict[str, list[float]]] = [{name: [] for name in METRICS} for _ in pair]
        for draw in range(draws):
            references, queries = draw_shots(images.samples, shots, draw)
            for row, prediction in zip(rows, score(pair, images, references, queries), strict=True):
                found = measure(prediction, images, queries)
                for name in METRICS:
                    row[name].append(getattr(found, name))
        gains.append(Gain(product_of(samples[0]), *rows))
    progress("comparing", len(products), len(products))
    return Gains(tuple(gains))
