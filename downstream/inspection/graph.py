"""A fitted detector as one graph: images in, scores and maps out, everything else a constant.

Shapes: B images (any number), S = the network's input side, L levels, T tokens per image, N_l reference tokens,
Q = B * T queries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adpretrain.extractor import ADExtractor
from adpretrain.projector import FixedKeyValueProjector, LearnableKeyValueProjector
from adpretrain.references import ReferenceBank
from adpretrain.residual import SearchIndex, as_map, residual_tokens, similarities, tokens
from downstream.detectors.aligned import AlignedFeatureNorm
from downstream.detectors.featurenorm import FeatureNorm

ROUNDING = 1e-6  # of a similarity, relative to the lengths of query and reference: float32 features and sums


class Inspector(nn.Module):
    """A fitted `FeatureNorm` whose forward is one graph: all that does not depend on the image is a constant.

    The references, their search indices and scales and the projector's keys and values are buffers. Backbone and
    layers are the extractor's own, not copies; a later `set_references` does not reach the inspector. Similarities of
    a whole batch, B * T * max N_l floats, are held at once.

    Raises ValueError without an extractor, without references, or if every image has references of its own.
    """

    def __init__(self, detector: FeatureNorm) -> None:
        super().__init__()
        extractor = detector.extract
        if isinstance(detector, AlignedFeatureNorm):
            raise ValueError("an inspector has one set of references for all images; aligned ones cannot be exported")
        if not isinstance(extractor, ADExtractor) or extractor.references is None:
            raise ValueError("only a FeatureNorm of an ADExtractor can be exported, after fit(normal_images)")
        if (banks := extractor.references.banks) != 1:
            raise ValueError(f"an inspector has one set of references for all images, not {banks}")
        self.from_features, self.local_scale = detector.from_features, extractor.local_scale
        self.metric = extractor.config.matching
        self.backbone = extractor.backbone
        self.projectors = nn.ModuleList(map(_fixed, extractor.projector.levels)) if extractor.projector else None
        with torch.no_grad():
            crossed = extractor.projector is not None and extractor.projector.needs_reference_residuals
            self._register(extractor.references, crossed)
        self.eval()

    def _register(self, bank: ReferenceBank, crossed: bool) -> None:
        assert bank.indices is not None
        for level, (bank_1NC, index) in enumerate(zip(bank.levels, bank.indices, strict=True)):
            # Clones: what the extractor made in inference mode cannot be part of a graph.
            self.register_buffer(f"bank_{level}", bank_1NC.clone())
            self.register_buffer(f"scale_{level}", bank.scales[level].clone() if bank.scales else None)
            self.register_buffer(f"rows_{level}", index.rows.clone())
            self.register_buffer(f"shift_{level}", None if index.shift is None else index.shift.clone())
            self.register_buffer(f"context_{level}", bank.context[level].clone() if crossed else None)

    def _index(self, level: int) -> SearchIndex:
        return SearchIndex(getattr(self, f"rows_{level}"), getattr(self, f"shift_{level}"))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] float32, normalised -> scores [B], maps [B, S, S]: what the detector's `predict` gives."""
        projected = []
        for level, feature in enumerate(self.backbone(images)):
            bank, scale = getattr(self, f"bank_{level}"), getattr(self, f"scale_{level}")
            x_BTC = residual_tokens(tokens(feature), bank, self.metric, None, scale, self._index(level))
            if self.projectors is not None:
                x_BTC = self.projectors[level](x_BTC, getattr(self, f"context_{level}"))
            projected.append(as_map(x_BTC, feature))
        if self.local_scale is not None:
            projected = self.local_scale.weighted(projected)
        prediction = self.from_features(projected)
        return prediction.scores, prediction.maps

    @torch.no_grad()
    def ties(self, images: Tensor) -> Tensor:
        """Which of the images [B, 3, S, S] hold a token with two nearest references, equally near within rounding: [B].

        Which of the two is taken, and with it the residual, is then up to the order of a sum: correct programs differ.
        """
        tied = torch.zeros(images.shape[0], dtype=torch.bool, device=images.device)
        for level, feature in enumerate(self.backbone(images)):
            index, query_QC = self._index(level), tokens(feature).flatten(0, 1)
            nearest, second = similarities(query_QC, index).topk(2, dim=1).values.unbind(1)
            length_Q = (query_QC if index.shift is None else query_QC - index.shift).norm(dim=1)
            rounding_Q = ROUNDING * length_Q * index.rows[:, :-1].norm(dim=1).max()
            tied |= (nearest - second <= rounding_Q).view(images.shape[0], -1).any(1)
        return tied


def _fixed(level: nn.Module) -> nn.Module:
    return FixedKeyValueProjector(level) if isinstance(level, LearnableKeyValueProjector) else level
