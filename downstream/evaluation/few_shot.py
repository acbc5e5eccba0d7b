"""Few-shot evaluation: K references, everything else scored, nothing chosen on the scored images.

Shapes: n images of a group, L levels, S side in pixels, K references.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from adpretrain.backbones import Backbone, FeatureMaps
from adpretrain.backbones.weights import same_weights
from adpretrain.data import ImageDataset, Sample
from adpretrain.data.checking import inverted
from adpretrain.extractor import ADExtractor
from adpretrain.references import random_references
from downstream.detector import Prediction
from downstream.detectors.featurenorm import FeatureNorm, FeatureNormConfig
from downstream.metrics import Metrics, evaluate_maps

BATCH = 16
PIXEL_METRICS = tuple(field.name for field in fields(Metrics) if field.name.startswith(("pixel", "aupro")))


@dataclass(frozen=True)
class FeatureSet:
    """The images of one product and camera view, seen once by a backbone.

    ``features``: L levels [n, C_l, H_l, W_l], as the backbone gives them; ``masks``: bool [n, S, S]; ``samples``: n.
    """

    samples: list[Sample]
    features: FeatureMaps
    masks: Tensor

    def normals(self) -> list[int]:
        """Indices that references may come from, see `normals`."""
        return normals(self.samples)

    def queries(self, references: Sequence[int]) -> list[int]:
        """Indices to score, see `queries`."""
        return queries(self.samples, references)


def normals(samples: Sequence[Sample]) -> list[int]:
    """Indices that may be learnt from: the normal images, of the train split where there is one, else of the
    validation split where there is one; not the unmarked views of defective parts, nor a test image that a listing (or
    the hash of its bytes) gives to another split too."""
    tested = {sample.image for sample in samples if sample.split == "test"}
    good = [
        index
        for index, sample in enumerate(samples)
        if not (sample.anomalous or sample.of_defective_part) and (sample.split == "test" or sample.image not in tested)
    ]
    by_split = [[index for index in good if samples[index].split == name] for name in ("train", "validation")]
    return by_split[0] or by_split[1] or good


def queries(samples: Sequence[Sample], references: Sequence[int]) -> list[int]:
    """Indices to score: the test split where there is one, else everything but the validation split; no references.

    Raises ValueError if nothing is left.
    """
    chosen = set(references)
    held = [i for i, sample in enumerate(samples) if i not in chosen and sample.split == "test"]
    rest = [i for i, sample in enumerate(samples) if i not in chosen and sample.split != "validation"]
    if not (held or rest):
        raise ValueError(f"nothing to score: no test images, and every other one is a reference ({len(chosen)})")
    return held or rest


def about_bare(samples: Sequence[Sample]) -> str:
    """Why the samples have no pixel metrics: a defect without a mask would count as normal pixels. "" if they have."""
    bare = [sample.image.name for sample in samples if sample.anomalous and not sample.mask_files]
    if not bare:
        return ""
    return f"{len(bare)} defects have no mask, such as {bare[0]}: no pixel metrics, which need one for each"


def about_inverted(samples: Sequence[Sample], shares: Sequence[float]) -> str:
    """What `adpretrain check-data` says of masks that mark more than half of their image, which are ``shares`` of its
    pixels; "" if none does."""
    told = [line for s, share in zip(samples, shares, strict=True) if (line := inverted(s.mask_files, share))]
    more = f" ({len(told)} of such masks; `adpretrain check-data` lists all)" if len(told) > 1 else ""
    return told[0] + more if told else ""


def draw_shots(samples: Sequence[Sample], shots: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices of K random references of one product, and of the images to score against them.

    Raises ValueError naming the product if it has fewer than K normal images, or if nothing is left to score.
    """
    pool, product = normals(samples), product_of(samples[0])
    if shots > len(pool):
        raise ValueError(
            f"{product}: {shots} references (shots) cannot be drawn from its pool of {len(pool)} normal images; choose "
            "fewer shots, or leave this product out"
        )
    references = [pool[index] for index in random_references(len(pool), shots, seed)]
    try:
        return references, queries(samples, references)
    except ValueError as error:
        raise ValueError(f"{product}: {error}") from error


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


def product_of(sample: Sample) -> str:
    """The name of what shares references: its category and, if it has several, its camera view."""
    return f"{sample.category}/{sample.view}" if sample.view else sample.category


def by_product(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Samples grouped by category and camera view, the unit that shares references."""
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[product_of(sample)].append(sample)
    return dict(sorted(groups.items()))


@torch.no_grad()
def score(
    extractors: Sequence[ADExtractor],
    images: FeatureSet,
    references: Sequence[int],
    queries: Sequence[int],
    side: int | None = None,
    sigma: float = 4.0,
) -> list[Prediction]:
    """FeatureNorm of the queries against the references, with each extractor; maps of ``side`` pixels, None = the
    input's, blurred by ``sigma`` of them.

    The extractors must differ in their projectors only (`same_residuals`): the queries are matched once for all.
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
    """Whether two extractors match, scale and score alike: they differ in their projectors only, which get the same
    residuals and whose outputs are measured by one norm."""
    ours, theirs = ((e.config.backbone, e.config.matching, e.config.norm) for e in (first, second))
    if ours != theirs or not same_weights(first.config.fingerprint, second.config.fingerprint):
        return False
    if first.local_scale is None or second.local_scale is None:
        return first.local_scale is second.local_scale
    same = torch.equal(first.local_scale.single, second.local_scale.single)
    return same and first.local_scale.config == second.local_scale.config


@torch.no_grad()
def backbone_norm(images: FeatureSet, queries: Sequence[int], image_size: int) -> Prediction:
    """The plain norm of the backbone's own features, without references: the weakest baseline."""
    detector = FeatureNorm(lambda batch: [batch], FeatureNormConfig(image_size))
    parts = [
        detector.from_features([level[list(queries[start : start + BATCH])] for level in images.features])
        for start in range(0, len(queries), BATCH)
    ]
    return _joined(parts)


def measure(prediction: Prediction, images: FeatureSet, queries: Sequence[int]) -> Metrics:
    """Metrics of a prediction of ``queries``; those of pixels are nan if a defect has no mask."""
    masks, samples = images.masks[list(queries)], [images.samples[index] for index in queries]
    labels = [sample.anomalous for sample in samples]
    found = evaluate_maps(prediction.maps.cpu().numpy(), masks.numpy(), prediction.scores.cpu().numpy(), labels)
    if note := about_bare(samples):
        return replace(found, **dict.fromkeys(PIXEL_METRICS, math.nan), notes=(note,))
    return found


def few_shot(extractor: ADExtractor, images: FeatureSet, shots: int, seed: int = 0) -> Metrics:
    """Metrics with K random references. Raises ValueError as `draw_shots` does."""
    references, queries = draw_shots(images.samples, shots, seed)
    return measure(score([extractor], images, references, queries)[0], images, queries)
