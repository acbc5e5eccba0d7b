"""A fitted detector as one graph, from images to scores and maps, in which all that does not depend on the image is
constant; `downstream.inspection.onnx` exports it.

Shapes: B images (any number), S = the network's input side, L levels, T tokens per image, N_l reference tokens,
Q = B * T queries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.extractor import ADExtractor
from adpretrain.preprocess import Preprocess
from adpretrain.projector import FixedKeyValueProjector, LearnableKeyValueProjector
from adpretrain.references import ReferenceBank
from adpretrain.residual import SearchIndex, as_map, residual_tokens, similarities, tokens
from downstream.detector import Detector, Prediction
from downstream.extracts import device_of, fixed_picture
from downstream.roi import RegionOfInterest

TOLERANCE = 1e-4
ROUNDING = 1e-6  # float32 error of a similarity, relative to the lengths of query and reference, and of a feature
DRAWS = 8  # a choice between two that tie within rounding is missed by all random changes once in 2^8 times


class DetectorGraph(nn.Module):
    """Extraction, followed by the `Detector.traceable` copy of a fitted detector; or of its members, then of itself.

    Backbone and layers are shared with the extract, not copied; fitting the detector anew, or a later
    `set_references`, does not change the graph. A search holds all similarities of a batch in memory at once: Q times
    the rows of its bank, or B * T * max N_l for references, floats.

    Raises ValueError with the reason if the detector is not fitted or cannot be exported, and if its extract is a
    function of another program or has other references for every image.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        detector.check_fitted()
        self.traceable = detector.traceable()
        self.members = nn.ModuleList(map(DetectorGraph, detector.members))
        self.extract = None if detector.members else _constant(detector.extract)
        if detector.roi_each:
            raise ValueError("the exported detector has one region of interest for all images, not one for each")
        self.region = None if detector.roi is None else RegionOfInterest(detector.roi)
        if self.region is not None:  # the cells inside are computed here, and are constants of the graph
            self(fixed_picture(detector.side, device_of(detector.extract)))
        self.eval()

    @property
    def preprocess(self) -> Preprocess:
        """Photograph -> "images"; members get the same images."""
        return self.members[0].preprocess if self.extract is None else self.extract.preprocess  # type: ignore[return-value]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] float32, normalised -> scores [B], maps [B, S, S], as the detector's `predict` gives them."""
        if self.extract is None:
            members = [Prediction(*member(images)) for member in self.members]
            prediction = self.traceable.from_members(images, members, self.region)
        else:
            features = self.traceable.seen(images, self.extract(images))
            prediction = self.traceable.from_features(features, self.region)
        maps = prediction.maps
        return prediction.scores, maps if self.region is None else self.region.only(maps)

    def held(self) -> Iterator[Tensor]:
        """Yield all tensors that the graph holds: weights, references, and the fitted state of detector and members."""
        yield from (*self.parameters(), *self.buffers())
        for graph in self.modules():
            if isinstance(graph, DetectorGraph):
                yield from graph.traceable.state()[0].values()

    @torch.no_grad()
    def ties(self, images: Tensor, tolerance: float = TOLERANCE) -> Tensor:
        """Find the images [B, 3, S, S] whose result depends on rounding; two correct programs may differ. Bools [B].

        Either a token's two nearest references tie (`ConstantExtractor.ties`), or the detector chooses between two
        patches, neighbours or images that tie: then random changes of the features by their rounding error change score
        or map by more than ``tolerance``, relative to the largest of the batch.
        """
        if self.extract is None:
            return torch.stack([member.ties(images, tolerance) for member in self.members]).any(0)  # type: ignore[operator]
        features = self.traceable.seen(images, self.extract(images))
        expected, generator = self.traceable.from_features(features, self.region), torch.Generator().manual_seed(0)
        tied = torch.zeros(len(images), dtype=torch.bool)
        for _ in range(DRAWS):
            other = self.traceable.from_features([_rounded(level, generator) for level in features], self.region)
            tied |= difference(other, expected, largest(expected)).amax(0) > tolerance
        return tied | self.extract.ties(images) if isinstance(self.extract, ConstantExtractor) else tied


def difference(found: Prediction, expected: Prediction, unit_2: Tensor) -> Tensor:
    """Largest differences of scores and of maps, in ``unit_2`` of each, for every image: [2, B]; NaN is infinite."""
    outside = expected.maps.isnan() & found.maps.isnan()
    maps = (found.maps - expected.maps).abs().masked_fill(outside, 0.0).amax((1, 2))
    error_2B = torch.stack([(found.scores - expected.scores).abs(), maps]).nan_to_num(torch.inf)
    return (error_2B / unit_2[:, None]).nan_to_num(0.0, posinf=torch.inf)  # 0 / 0: all values are zero in both


def largest(prediction: Prediction) -> Tensor:
    """The largest absolute score and map value: [2]."""
    return torch.stack([prediction.scores.abs().max(), prediction.maps.nan_to_num(0.0).abs().max()])


def _rounded(level_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(level_BCHW.shape, generator=generator, dtype=level_BCHW.dtype)
    return level_BCHW + ROUNDING * level_BCHW.square().mean((1, 2, 3), keepdim=True).sqrt() * noise


class ConstantExtractor(nn.Module):
    """An `ADExtractor` with constant references: these, their search indices and scales, and the projector's keys and
    values are buffers.

    Raises ValueError if there are no references, or if every image has different ones.
    """

    def __init__(self, extractor: ADExtractor) -> None:
        super().__init__()
        self.metric, self.local_scale = extractor.config.matching, extractor.local_scale
        self.backbone, self.preprocess = extractor.backbone, extractor.preprocess
        self.projectors = nn.ModuleList(map(_fixed, extractor.projector.levels)) if extractor.projector else None
        if self.metric == "none":
            return
        if extractor.references is None:
            raise ValueError("the extractor has no references: call set_references(normal_images) or fit first")
        if (banks := extractor.references.banks) != 1:
            raise ValueError(f"the exported detector has one set of references for all images, not {banks}")
        with torch.no_grad():
            crossed = extractor.projector is not None and extractor.projector.needs_reference_residuals
            self._register(extractor.references, crossed)

    def _register(self, bank: ReferenceBank, crossed: bool) -> None:
        assert bank.indices is not None
        for level, (bank_1NC, index) in enumerate(zip(bank.levels, bank.indices, strict=True)):
            # Clones are needed because tensors made in inference mode cannot be part of a graph.
            self.register_buffer(f"bank_{level}", bank_1NC.clone())
            self.register_buffer(f"scale_{level}", bank.scales[level].clone() if bank.scales else None)
            self.register_buffer(f"rows_{level}", index.rows.clone())
            self.register_buffer(f"shift_{level}", None if index.shift is None else index.shift.clone())
            self.register_buffer(f"context_{level}", bank.context[level].clone() if crossed else None)

    def _index(self, level: int) -> SearchIndex:
        return SearchIndex(getattr(self, f"rows_{level}"), getattr(self, f"shift_{level}"))

    def forward(self, images: Tensor) -> FeatureMaps:
        """Extract L levels [B, C_l, H_l, W_l] from images [B, 3, S, S], as the extractor does."""
        projected = []
        for level, feature in enumerate(self.backbone(images)):
            x_BTC, context = tokens(feature), None
            if self.metric != "none":
                bank, scale = getattr(self, f"bank_{level}"), getattr(self, f"scale_{level}")
                x_BTC = residual_tokens(x_BTC, bank, self.metric, None, scale, self._index(level))
                context = getattr(self, f"context_{level}")
            if self.projectors is not None:
                x_BTC = self.projectors[level](x_BTC, context)
            projected.append(as_map(x_BTC, feature))
        return projected if self.local_scale is None else self.local_scale.weighted(projected)

    @torch.no_grad()
    def ties(self, images: Tensor) -> Tensor:
        """Find the images [B, 3, S, S] that have a token whose two nearest references tie within rounding: bools [B].

        Which of the two is taken, and thus the residual, then depends on rounding.
        """
        tied = torch.zeros(images.shape[0], dtype=torch.bool, device=images.device)
        for level, feature in enumerate(self.backbone(images) if self.metric != "none" else ()):
            index, query_QC = self._index(level), tokens(feature).flatten(0, 1)
            nearest, second = similarities(query_QC, index).topk(2, dim=1).values.unbind(1)
            length_Q = (query_QC if index.shift is None else query_QC - index.shift).norm(dim=1)
            rounding_Q = ROUNDING * length_Q * index.rows[:, :-1].norm(dim=1).max()
            tied |= (nearest - second <= rounding_Q).view(images.shape[0], -1).any(1)
        return tied


def _constant(extract: Extract) -> nn.Module:
    if isinstance(extract, ADExtractor):
        return ConstantExtractor(extract)
    if not isinstance(extract, nn.Module) or not isinstance(getattr(extract, "preprocess", None), Preprocess):
        raise ValueError(
            f"the detector was fitted on features of a {type(extract).__name__} that does not say how photographs are "
            "prepared for it: only detectors on a Backbone or an ADExtractor can be exported"
        )
    return extract


def _fixed(level: nn.Module) -> nn.Module:
    return FixedKeyValueProjector(level) if isinstance(level, LearnableKeyValueProjector) else level
