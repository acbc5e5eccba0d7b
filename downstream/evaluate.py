"""Few-shot evaluation: K references, everything else scored, nothing chosen on the scored images.

Shapes: n images of a group, L levels, S side in pixels, K references.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adpretrain.backbones import Backbone, FeatureMaps, References
from adpretrain.data import ImageDataset, Sample
from adpretrain.extractor import ADExtractor
from adpretrain.references import random_references
from adpretrain.residual import tokens
from downstream.detector import Prediction
from downstream.featurenorm import FeatureNorm
from downstream.metrics import Metrics, evaluate_maps

BATCH = 16


@dataclass(frozen=True)
class FeatureSet:
    """The images of one product and camera view, seen once by a backbone.

    ``features``: L levels [n, C_l, H_l, W_l], as the backbone gives them; ``masks``: bool [n, S, S]; ``samples``: n.
    """

    samples: list[Sample]
    features: FeatureMaps
    masks: Tensor

    def normals(self) -> list[int]:
        """Indices that references may come from: the normal images, of the train split where there is one."""
        good = [index for index, sample in enumerate(self.samples) if not sample.anomalous]
        return [index for index in good if self.samples[index].split == "train"] or good

    def queries(self, references: Sequence[int]) -> list[int]:
        """Indices to score: the test split where there is one, else everything that is not a reference."""
        held = [index for index, sample in enumerate(self.samples) if sample.split == "test"]
        chosen = set(references)
        return held or [index for index in range(len(self.samples)) if index not in chosen]


def encode_samples(
    samples: Sequence[Sample],
    backbone: Backbone,
    device: torch.device | str = "cpu",
    step: Callable[[], None] | None = None,
) -> FeatureSet:
    """Run a backbone once over samples; ``step`` is called after every image (for a progress bar)."""
    data = ImageDataset(samples, backbone.preprocess)
    features: list[list[Tensor]] = [[] for _ in backbone.channels]
    masks = []
    for index in range(len(data)):
        item = data[index]
        with torch.no_grad():
            for level, feature in zip(features, backbone(item["image"][None].to(device)), strict=True):
                level.append(feature)
        masks.append(item["mask"])
        if step is not None:
            step()
    return FeatureSet(list(samples), [torch.cat(level) for level in features], torch.stack(masks))


def by_product(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Samples grouped by category and camera view, the unit that shares references."""
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[f"{sample.category}/{sample.view}" if sample.view else sample.category].append(sample)
    return dict(sorted(groups.items()))


def reference_banks(extractor: ADExtractor, images: FeatureSet, references: Sequence[int]) -> References:
    """Banks [1, K * T, C_l] of the chosen images."""
    chosen = extractor.condition([level[list(references)] for level in images.features])
    return [tokens(level).flatten(0, 1)[None] for level in chosen]


@torch.no_grad()
def score(extractor: ADExtractor, images: FeatureSet, references: Sequence[int], queries: Sequence[int]) -> Prediction:
    """FeatureNorm of the queries against the references; sets the extractor's references."""
    banks = reference_banks(extractor, images, references)
    extractor.set_references(banks)
    detector = FeatureNorm(extractor, image_size=extractor.preprocess.image_size)
    parts = []
    for start in range(0, len(queries), BATCH):
        rows = list(queries[start : start + BATCH])
        features = extractor.condition([level[rows] for level in images.features])
        parts.append(detector.from_features(extractor.from_encoded(features, banks)))
    return Prediction(torch.cat([p.scores for p in parts]), torch.cat([p.maps for p in parts]))


@torch.no_grad()
def backbone_norm(images: FeatureSet, queries: Sequence[int], image_size: int) -> Prediction:
    """The plain norm of the backbone's own features, without references: the weakest baseline."""
    detector = FeatureNorm(lambda batch: [batch], image_size=image_size)
    parts = [
        detector.from_features([level[list(queries[start : start + BATCH])] for level in images.features])
        for start in range(0, len(queries), BATCH)
    ]
    return Prediction(torch.cat([p.scores for p in parts]), torch.cat([p.maps for p in parts]))


def measure(prediction: Prediction, images: FeatureSet, queries: Sequence[int]) -> Metrics:
    """Metrics of a prediction of ``queries``."""
    masks = images.masks[list(queries)]
    return evaluate_maps(prediction.maps.cpu().numpy(), masks.numpy(), prediction.scores.cpu().numpy())


def few_shot(extractor: ADExtractor, images: FeatureSet, shots: int, seed: int = 0) -> Metrics:
    """Metrics with K random references. Raises ValueError if the group has fewer than K normal images to draw from."""
    pool = images.normals()
    references = [pool[index] for index in random_references(len(pool), shots, seed)]
    queries = images.queries(references)
    return measure(score(extractor, images, references, queries), images, queries)
