"""Features against normal references, none of which is ever compared with itself.

A detector is often fitted on the very images that are the extractor's references. Their residuals would be zero, and
a memory of zeros knows nothing of the product. So an image that is a reference is compared with the other K - 1 while
a detector is fitted. Scored images are compared with all K, as they are by the extractor in use: an anomaly that was
taken for a reference (contamination with overlap) is scored as one.

Shapes: B images, K references, S side in pixels, L levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adpretrain.backbones import Backbone, FeatureMaps
from adpretrain.extractor import ADExtractor
from adpretrain.preprocess import Preprocess


class Withheld:
    """An `Extract` around an `ADExtractor`: [B, 3, S, S] -> L levels [B, C_l, H_l, W_l].

    With a single reference there is no other: it is compared with itself after all.
    """

    def __init__(self, extractor: ADExtractor) -> None:
        self.extractor = extractor
        self._own: list[Tensor] = []

    @property
    def preprocess(self) -> Preprocess:
        """Photograph -> network input."""
        return self.extractor.preprocess

    @property
    def backbone(self) -> Backbone:
        """The network below."""
        return self.extractor.backbone

    def set_references(self, images: Tensor) -> Withheld:
        """Keep the references of every later call: images [K, 3, S, S]."""
        self.extractor.set_references(images)
        self._own = list(images)
        return self

    def compare_with_all(self) -> None:
        """From now on, until the next references, no image is kept from meeting itself: for images to score."""
        self._own = []

    @torch.no_grad()
    def __call__(self, images: Tensor) -> FeatureMaps:
        """Features of the images; equality to the last bit tells which of them are references."""
        features = self.extractor(images)
        bank = self.extractor.references
        assert bank is not None
        if len(self._own) < 2:
            return features
        for row, image in enumerate(images):
            same = [number for number, own in enumerate(self._own) if torch.equal(own, image)]
            if same and len(same) < len(self._own):
                others = self.extractor(images[row : row + 1], bank.without(same))
                for level, alone in zip(features, others, strict=True):
                    level[row] = alone[0]
        return features
