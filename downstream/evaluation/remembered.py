"""A backbone that sees every image once: detectors, references and draws meet the same photographs again and again.

Shapes: B images, S side in pixels, L levels.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from adpretrain.backbones import Backbone, FeatureMaps

ROOM = 2 << 30  # bytes of features that are kept


class Remembered:
    """Stands before ``backbone.forward`` from now on, and keeps the features of images up to ``room`` bytes.

    The backbone stays what it is for whoever asks for its kind. Images are told apart by their pixels. Each goes
    through the network alone, so that its features do not depend on what it came with: an evaluation that was
    interrupted ends with the same numbers.
    """

    def __init__(self, backbone: Backbone, room: int = ROOM) -> None:
        self.room, self._held = room, 0
        self._seen: dict[bytes, FeatureMaps] = {}
        self._forward = backbone.forward
        backbone.forward = self  # type: ignore[method-assign]

    def forget(self) -> None:
        """Give the memory back, as for another product."""
        self._seen, self._held = {}, 0

    def __call__(self, images: Tensor) -> FeatureMaps:
        """[B, 3, S, S] -> L levels [B, C_l, H_l, W_l], as the backbone gives them for each image."""
        rows = [self._features(image[None]) for image in images]
        return [torch.cat(level) for level in zip(*rows, strict=True)]

    def _features(self, image: Tensor) -> FeatureMaps:
        key = hashlib.blake2b(image.detach().cpu().contiguous().numpy().tobytes()).digest()
        if key in self._seen:
            return self._seen[key]
        found = self._forward(image)
        size = sum(level.numel() * level.element_size() for level in found)
        if self._held + size <= self.room:
            self._seen[key] = found
            self._held += size
        return found
