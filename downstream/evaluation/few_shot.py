"""FeatureNorm with K references on features that are computed once: training scores held-out products with it, and
studies use it. Nothing is chosen on the scored images.

Shapes: n images of a group, L levels, S side in pixels, K references.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from adpretrain.backbones import Backbone, FeatureMaps
from adpretrain.backbones.weights import same_weights
from adpretrain.data import ImageDataset, Sample
from adpretrain.data.products import about_bare, draw_shots, normals, queries
from adpretrain.extractor import ADExtractor
from adpretrain.progress import progress_bar
from adpretrain.saved import place
from downstream.detector import Prediction
from downstream.detectors.featurenorm import FeatureNorm, FeatureNormConfig
from downstream.evaluation.pictures import file_name, median_images, save_panels
from downstream.metrics import Metrics, evaluate_maps
from downstream.visualise import ColourScale

BATCH = 16
PIXEL_METRICS = tuple(field.name for field in fields(Metrics) if field.name.startswith(("pixel", "aupro")))


@dataclass(frozen=True)
class FeatureSet:
    """Backbone features of the images of one product and camera view.

    ``samples`` has n entries; ``features`` has L levels [n, C_l, H_l, W_l]; ``masks`` is bool [n, S, S].
    """

    samples: list[Sample]
    features: FeatureMaps
    masks: Tensor

    def normals(self) -> list[int]:
        """Indices of the images that can be references, see `normals`."""
        return normals(self.samples)

    def queries(self, references: Sequence[int]) -> list[int]:
        """Indices of the images to score, see `queries`."""
        return queries(self.samples, references)


def encode_samples(samples: Sequence[Sample], backbone: Backbone, device: torch.device | str = "cpu") -> FeatureSet:
    """Run a backbone once over samples."""
    data = ImageDataset(samples, backbone.preprocess)
    features: list[list[Tensor]] = [[] for _ in backbone.channels]
    masks = []
    for index in range(len(data)):
        item = data[index]
        with torch.no_grad():
            for level, feature in zip(features, backbone(item["image"][None].to(device)), strict=True):
                level.append(feature)
        masks.append(item["mask"])
    return FeatureSet(list(samples), [torch.cat(level) for level in features], torch.stack(masks))


@torch.no_grad()
def score(
    extractors: Sequence[ADExtractor],
    images: FeatureSet,
    references: Sequence[int],
    queries: Sequence[int],
    side: int | None = None,
    sigma: float = 4.0,
) -> list[Prediction]:
    """Score the queries against the references by FeatureNorm, with each extractor. Maps have ``side`` pixels (None =
    as many as the input) and are blurred with ``sigma`` pixels.

    The extractors must differ only in their projectors (`same_residuals`), because residuals are computed once for all.
    """
    first = extractors[0]
    bank = first.bank_of([level[list(references)] for level in images.features])
    detector = FeatureNorm(first, FeatureNormConfig(side, sigma))
    parts: list[list[Prediction]] = [[] for _ in extractors]
    for start in range(0, len(queries), BATCH):
        rows = list(queries[start : start + BATCH])
        features = [level[rows] for level in images.features]
        residuals = bank.residuals(features)
        for collected, extractor in zip(parts, extractors, strict=True):
            collected.append(detector.from_features(extractor.project(residuals, bank)))
    return [_joined(collected) for collected in parts]


def _joined(parts: Sequence[Prediction]) -> Prediction:
    return Prediction(torch.cat([part.scores for part in parts]), torch.cat([part.maps for part in parts]))


def same_residuals(first: ADExtractor, second: ADExtractor) -> bool:
    """Say whether two extractors differ only in their projectors, so that these get the same residuals and their
    outputs are measured by the same norm."""
    ours, theirs = ((e.config.backbone, e.config.matching, e.config.norm) for e in (first, second))
    if ours != theirs or not same_weights(first.config.fingerprint, second.config.fingerprint):
        return False
    if first.local_scale is None or second.local_scale is None:
        return first.local_scale is second.local_scale
    same = torch.equal(first.local_scale.single, second.local_scale.single)
    return same and first.local_scale.config == second.local_scale.config


def measure(prediction: Prediction, images: FeatureSet, queries: Sequence[int]) -> Metrics:
    """Measure the prediction of ``queries``; pixel metrics are nan if a defect has no mask."""
    masks, samples = images.masks[list(queries)], [images.samples[index] for index in queries]
    labels = [sample.anomalous for sample in samples]
    found = evaluate_maps(prediction.maps.cpu().numpy(), masks.numpy(), prediction.scores.cpu().numpy(), labels)
    if note := about_bare(samples):
        return replace(found, **dict.fromkeys(PIXEL_METRICS, math.nan), notes=(note,))
    return found


def few_shot(extractor: ADExtractor, images: FeatureSet, shots: int, seed: int = 0) -> Metrics:
    """Measure an extractor with K = ``shots`` random references. Raises ValueError as `draw_shots` does."""
    references, queries = draw_shots(images.samples, shots, seed)
    return measure(score([extractor], images, references, queries)[0], images, queries)


EXAMPLES = 3  # heatmaps are drawn of at most this many products


class HeldOut:
    """Scores held-out products for `adpretrain.training.run.pretrain`; ``samples`` lists the images of each product, of
    which ``shots`` become references. Features of a frozen backbone are computed once."""

    def __init__(self, samples: Sequence[Sequence[Sample]], shots: int, console: Console) -> None:
        self.samples, self.shots, self.console = samples, shots, console
        self._seen: list[FeatureSet] = []

    def _sets(self, extractor: ADExtractor) -> list[FeatureSet]:
        if not (self._seen and extractor.backbone.frozen):
            device = place(extractor.backbone)
            with progress_bar(self.console) as bar:
                groups = bar.track(self.samples, description="held-out products")
                self._seen = [encode_samples(group, extractor.backbone, device) for group in groups]
        return self._seen

    def score(self, extractor: ADExtractor) -> dict[str, float]:
        """Return FeatureNorm's image AUROC and AUPRO, averaged over the products."""
        results = [few_shot(extractor, images, self.shots) for images in self._sets(extractor)]
        means = {name: [getattr(result, name) for result in results] for name in ("image_auroc", "aupro")}
        return {name: float(torch.tensor(values).nanmean()) for name, values in means.items()}

    def draw(self, extractor: ADExtractor, folder: Path) -> None:
        """Draw heatmaps of a few products, for the run's folder and its page on the Hub."""
        shots = max(2, self.shots)  # a colour scale needs at least two references
        for images in [images for images in self._sets(extractor) if len(images.normals()) >= shots][:EXAMPLES]:
            references, queries = draw_shots(images.samples, shots)
            prediction = score([extractor], images, references, queries)[0]
            photos = [extractor.preprocess(images.samples[index].read()) for index in references]
            normal = FeatureNorm(extractor).leave_one_out(torch.stack(photos).to(prediction.maps.device))
            scale = ColourScale.from_normal_maps(normal.maps.cpu().numpy())  # the same scale as in `adpretrain score`
            samples, masks = [images.samples[index] for index in queries], images.masks[queries].cpu().numpy()
            typical = median_images(samples, prediction.scores.cpu().numpy(), prediction.maps.cpu().numpy(), masks)
            name = file_name(samples[0].category, samples[0].view)
            save_panels(folder / name, typical[:1], scale, extractor.preprocess)
