"""A backbone that sees every image once: detectors, references and draws meet the same photographs again and again.

Shapes: B images, S side in pixels, L levels.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from adpretrain.backbones import Backbone, FeatureMaps

ROOM = 2 << 30  # bytes of features that are kept


class Remembered(Backbone):
    """``backbone``, with the features of images that it has seen, up to ``room`` bytes.

    Images are told apart by their pixels. Each goes through the network alone, so that its features do not depend on
    what it came with: an evaluation that was interrupted ends with the same numbers.
    """

    def __init__(self, backbone: Backbone, room: int = ROOM) -> None:
        super().__init__(
            backbone.name,
            backbone.channels,
            backbone.preprocess,
            backbone.levels,
            backbone.network,
            backbone.revision,
        )
        self.backbone, self.room = backbone, room
        self._seen: dict[bytes, FeatureMaps] = {}
        self._held = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    def forget(self) -> None:
        """Give the memory back, as for another product."""
        self._seen, self._held = {}, 0

    def forward(self, images: Tensor) -> FeatureMaps:
        """[B, 3, S, S] -> L levels [B, C_l, H_l, W_l], as ``backbone`` gives them for each image."""
        rows = [self._features(image[None]) for image in images]
        return [torch.cat(level) for level in zip(*rows, strict=True)]

    def _features(self, image: Tensor) -> FeatureMaps:
        key = hashlib.blake2b(image.detach().cpu().contiguous().numpy().tobytes()).digest()
        if key in self._seen:
            return self._seen[key]
        found = self.backbone(image)
        size = sum(level.numel() * level.element_size() for level in found)
        if self._held + size <= self.room:
            self._seen[key] = found
            self._held += size
        return found
