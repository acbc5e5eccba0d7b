"""The kinds of features that detectors are compared on. With and without pretraining differ only in the `Extract`.

raw          features of the backbone, without references
residual     feature minus nearest reference, without a learnt projector
scaled       residuals divided by the local scale: the extractor's, or of a backbone that of `LocalScaleConfig`
pretrained   features of the extractor

Shapes: B images, K references, S side in pixels, L levels.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adpretrain.backbones import Backbone, FeatureMaps, load_backbone
from adpretrain.backbones.weights import fingerprint
from adpretrain.extractor import ADExtractor
from adpretrain.hub.download import Located, locate
from adpretrain.local_scale import LocalScale
from adpretrain.preprocess import Preprocess
from adpretrain.references import ReferenceBank
from adpretrain.saved import backbone_config, folder_digest
from downstream.detectors.aligned import AlignedFeatureNorm
from downstream.evaluation.comparison import RAW, RESIDUAL, SCALED, ExtractorRow
from downstream.evaluation.few_shot import same_residuals

ALIGNED = AlignedFeatureNorm.name
ROOM = 2 << 30  # at most this many bytes of features are kept
UNKNOWN = (
    "a detector of several products makes images of its own while it learns, and it cannot be told with the references "
    "of which product they are to be compared: leave it out of multi-class, or use raw features"
)


@dataclass(frozen=True)
class Contender:
    """A detector on features. ``extractor`` is the number of one of the extractors that are averaged, or 0."""

    detector: str
    features: str
    extractor: int = 0

    def __str__(self) -> str:
        return f"{self.detector} on {self.features}"


@dataclass(frozen=True)
class Networks:
    """A backbone and the extractors built on it: seeds of one training, whose results are averaged, or none."""

    backbone: Backbone
    extractors: tuple[ADExtractor, ...] = ()

    def __post_init__(self) -> None:
        for number, extractor in enumerate(self.extractors):
            if not same_residuals(self.extractors[0], extractor):
                raise ValueError(f"extractor {number} and extractor 0 are not seeds of one training: score them apart")

    def extract(self, contender: Contender) -> Backbone | ADExtractor | Withheld:
        """Return the `Extract` of a contender; references, except of raw features, are set later or by the detector."""
        if contender.features == RAW:
            return self.backbone
        if not self.extractors:
            scale = LocalScale(len(self.backbone.channels)) if contender.features == SCALED else None
            extractor = ADExtractor(self.backbone, local_scale=scale)
        elif contender.features == RESIDUAL:
            extractor = ADExtractor(self.backbone, matching=self.extractors[0].config.matching)
        elif contender.features == SCALED:
            extractor = self.extractors[0].without_projector()
        else:
            extractor = self.extractors[contender.extractor]
        return extractor if contender.detector == ALIGNED else Withheld(extractor)


class Withheld:
    """An `Extract` around an `ADExtractor` that does not compare a reference with itself: [B, 3, S, S] -> L levels
    [B, C_l, H_l, W_l].

    A detector is often fitted on the same images that are the extractor's references. Their residuals would be zero,
    and a detector fitted on zeros learns nothing about the product. So, while a detector is fitted, a reference is
    compared with the other K - 1; a single reference has no other and is still compared with itself. Images to score
    are compared with all K, as by the extractor in use: an anomaly that is also a reference (contamination with
    overlap) is compared with itself.

    One detector of several products meets each with its own references, but may come back to the images of any product
    when those of another are set (a training loop does): `keep_references_of` says which images that holds for.
    """

    def __init__(self, extractor: ADExtractor) -> None:
        self.extractor = extractor
        self._own: list[Tensor] = []
        self._kept: dict[bytes, tuple[ReferenceBank, list[Tensor]]] = {}
        self._refusing = False

    @property
    def preprocess(self) -> Preprocess:
        """The preprocessing, from photograph to network input."""
        return self.extractor.preprocess

    @property
    def backbone(self) -> Backbone:
        """The backbone of the extractor."""
        return self.extractor.backbone

    def set_references(self, images: Tensor) -> Withheld:
        """Set the references for all later calls: images [K, 3, S, S]."""
        self.extractor.set_references(images)
        self._own, self._refusing = list(images), False
        return self

    def keep_references_of(self, images: Tensor) -> None:
        """Compare these images [B, 3, S, S] with the present references even after others are set."""
        bank = self.extractor.references
        assert bank is not None
        self._kept |= {digest(image): (bank, self._own) for image in images}

    def refuse_others(self) -> None:
        """Refuse all other images until the next `set_references`, as nobody knows of which product they are."""
        self._refusing = True

    def compare_with_all(self) -> None:
        """Compare images with all references, even with themselves, until the next `set_references`: for scoring."""
        self._own, self._kept = [], {}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> FeatureMaps:
        """Return the features of images; an image that equals a reference bit by bit counts as that reference. Raises
        ValueError for an image of which the product is not known."""
        bank = self.extractor.references
        assert bank is not None
        if not self._kept:
            return self._compared(images, bank, self._own)
        rows = []
        for image in images:
            found = self._kept.get(digest(image))
            if found is None and self._refusing:
                raise ValueError(UNKNOWN)
            rows.append(self._compared(image[None], *(found or (bank, self._own))))
        return [torch.cat(level) for level in zip(*rows, strict=True)]

    def _compared(self, images: Tensor, bank: ReferenceBank, own: list[Tensor]) -> FeatureMaps:
        """The features of images, each compared with all of these references but itself."""
        features = self.extractor(images, bank)
        if len(own) < 2:
            return features
        for row, image in enumerate(images):
            same = [number for number, other in enumerate(own) if torch.equal(other, image)]
            if same and len(same) < len(own):
                others = self.extractor(images[row : row + 1], bank.without(same))
                for level, alone in zip(features, others, strict=True):
                    level[row] = alone[0]
        return features


def digest(image: Tensor) -> bytes:
    """A digest of the pixels of an image."""
    return hashlib.blake2b(image.detach().cpu().contiguous().numpy().tobytes()).digest()


class Remembered:
    """A cache that replaces ``backbone.forward`` and keeps up to ``room`` bytes of features, because detectors,
    references and draws use the same photographs many times.

    The backbone keeps its class. Images are recognised by their pixels. Each goes through the network alone, so that
    its features do not depend on the other images of a batch, and an interrupted evaluation ends with the same
    numbers.
    """

    def __init__(self, backbone: Backbone, room: int = ROOM) -> None:
        self.room, self._held = room, 0
        self._seen: dict[bytes, FeatureMaps] = {}
        self._forward = backbone.forward
        backbone.forward = self  # type: ignore[method-assign]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the backbone has its plain forward pass: it may be trained, so that what it saw is out of date."""
        return copy.deepcopy(self._forward, memo)

    def forget(self) -> None:
        """Empty the cache, before another product."""
        self._seen, self._held = {}, 0

    def __call__(self, images: Tensor) -> FeatureMaps:
        """[B, 3, S, S] -> L levels [B, C_l, H_l, W_l], which the backbone computes image by image."""
        rows = [self._features(image[None]) for image in images]
        return [torch.cat(level) for level in zip(*rows, strict=True)]

    def _features(self, image: Tensor) -> FeatureMaps:
        key = digest(image)
        if key in self._seen:
            return self._seen[key]
        found = self._forward(image)
        size = sum(level.numel() * level.element_size() for level in found)
        if self._held + size <= self.room:
            self._seen[key] = found
            self._held += size
        return found


@dataclass(frozen=True)
class Features:
    """A loaded row of a comparison's extractors. ``sees`` holds what its features depend on besides the extractors, and
    ``digests`` the digest of each extractor by its source; both are ready for JSON."""

    name: str
    kind: str
    networks: Networks
    sees: dict[str, Any]
    digests: dict[str, str]
    revision: str | None = None  # the commit on the Hub of the first extractor
    random_weights: int | None = None

    def contenders(self, detector: str) -> list[tuple[Contender, dict[str, Any]]]:
        """Return the detector on every extractor, or once if they share the features, and what each depends on."""
        digests = list(self.digests.values()) if self.kind == "pretrained" else list(self.digests.values())[:1]
        return [
            (Contender(detector, self.kind, number), {**self.sees, "features": self.kind, "extractor": digest})
            for number, digest in enumerate(digests or [None])
        ]


def load_features(rows: Mapping[str, ExtractorRow], device: str) -> tuple[list[Features], list[Remembered]]:
    """Load every row, and cache the features of its backbone; rows with the same network and preprocessing share one.

    Raises ValueError, naming the row, if it cannot be loaded or does not have the features it asks for.
    """
    found: list[Features] = []
    backbones: list[tuple[dict[str, Any], Backbone]] = []
    loaded: dict[tuple[str, str | None], tuple[ADExtractor, str, str | None]] = {}
    for name, row in rows.items():
        try:
            for source in row.sources:
                if (source, row.weights) not in loaded:
                    at = locate_extractor(source)
                    extractor = ADExtractor.from_pretrained(at.folder, device, row.weights)
                    loaded[source, row.weights] = extractor, folder_digest(at.folder), at.commit
            own = {source: loaded[source, row.weights] for source in row.sources}
            extractors = tuple(extractor for extractor, *_ in own.values())
            backbone = extractors[0].backbone if extractors else _backbone(row).to(device)
            sees = {
                "backbone": asdict(backbone_config(backbone)),
                "preprocess": backbone.preprocess.to_dict(),
                "fingerprint": fingerprint(backbone.network),  # of the weights, as a file can change and keep its name
            }
            shared = next((known for seen, known in backbones if seen == sees), None)
            if shared is None:
                shared = backbone
                backbones.append((sees, shared))
            for extractor in extractors:
                extractor.backbone = shared
            if row.kind == SCALED and extractors and not extractors[0].local_scale:
                raise ValueError("features 'scaled' need an extractor with a local scale")
            digests = {source: digest for source, (_, digest, _) in own.items()}
            revision = next((commit for *_, commit in own.values()), None)
            networks = Networks(shared, extractors)
            found.append(Features(name, row.kind, networks, sees, digests, revision, row.random_weights))
        except ValueError as error:
            raise ValueError(f"extractor {name}: {error}") from error
    return found, [Remembered(known) for _, known in backbones]


def locate_extractor(name: str) -> Located:
    """Find an extractor, which is given as a folder, org/name[@revision] on the Hub, or "embedded"."""
    source, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
    return locate(source, revision or None)


def _backbone(row: ExtractorRow) -> Backbone:
    assert row.backbone is not None
    if row.random_weights is not None:
        torch.manual_seed(row.random_weights)
    return load_backbone(
        row.backbone,
        row.random_weights is None,
        weights=row.weights,
        image_size=row.image_size or 224,
        levels=row.levels,
        resize=row.resize or "squeeze",
        crop_from=row.crop_from,
        finest=row.finest or 0,
    )
