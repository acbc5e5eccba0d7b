"""Each of K normal photographs as if it were new: its features with the other K - 1 as references.

Calling the extractor K times would match every token with every other K - 1 times over, because the scales of the
references change with the photograph that is left out. One pass that keeps each token's nearest neighbour in every
photograph answers all K questions.

Shapes: K photographs of T = H * W tokens, N = K * T, C channels, L levels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adpretrain.backbones import FeatureMaps
from adpretrain.extractor import ADExtractor
from adpretrain.residual import as_map, nearest_in_each_image, tokens


class _Table(NamedTuple):
    """One level: the bank, and each token's nearest neighbour in every photograph."""

    bank_NC: Tensor
    similarity_NK: Tensor  # -inf for the token's own photograph
    index_NK: Tensor

    def residuals(self, rows: Tensor, without: int | None = None) -> tuple[Tensor, Tensor]:
        """Residuals [n, C] of some of the tokens against all photographs but their own and ``without``, and the
        matched tokens [n]."""
        similarity = self.similarity_NK[rows]
        if without is not None:
            similarity = similarity.clone()
            similarity[:, without] = -torch.inf
        matched = self.index_NK[rows].gather(1, similarity.argmax(1, keepdim=True))[:, 0]
        return self.bank_NC[rows] - self.bank_NC[matched], matched


def _table(feature_KCHW: Tensor, metric: str) -> _Table:
    bank_KTC = tokens(feature_KCHW)
    similarity_NK, index_NK = nearest_in_each_image(bank_KTC, int(feature_KCHW.shape[3]), metric)
    own = torch.arange(len(bank_KTC), device=bank_KTC.device).repeat_interleave(bank_KTC.shape[1])
    similarity_NK[torch.arange(len(own), device=own.device), own] = -torch.inf
    return _Table(bank_KTC.flatten(0, 1), similarity_NK, index_NK)


def _one_by_one(extractor: ADExtractor, images: Tensor) -> FeatureMaps:
    """The definition, by K calls of the extractor."""
    shots = images.shape[0]
    banks = extractor.encode_references(images)
    parts = []
    for image in range(shots):
        keep = [index for index in range(shots) if index != image]
        others = [bank.unflatten(1, (shots, -1))[:, keep].flatten(1, 2) for bank in banks]
        parts.append(extractor(images[image : image + 1], others))
    return [torch.cat(level) for level in zip(*parts, strict=True)]


@torch.no_grad()
def leave_one_out(extractor: ADExtractor, images: Tensor) -> FeatureMaps:
    """K normal photographs [K, 3, S, S] -> the extractor's features of each, L levels [K, C_l, H_l, W_l], with the
    others as references. The extractor's own references are neither used nor changed.

    Raises ValueError if K < 2.
    """
    shots = images.shape[0]
    if shots < 2:
        raise ValueError(f"leave-one-out needs at least 2 references, got {shots}")
    crossed = extractor.projector is not None and extractor.projector.needs_reference_residuals
    if extractor.config.matching == "none":
        return extractor(images)
    if shots == 2 or crossed:  # a single reference left has a scale of its own kind; crossed attention needs the rest
        return _one_by_one(extractor, images)
    features = extractor.encode(images)
    residuals = [_level(extractor, feature) for feature in features]
    return extractor.weighted(residuals if extractor.projector is None else extractor.projector(residuals))


def _level(extractor: ADExtractor, feature_KCHW: Tensor) -> Tensor:
    """Residuals of one level, each photograph's against the others: [K, C, H, W]."""
    shots, _, height, width = feature_KCHW.shape
    table = _table(feature_KCHW, extractor.config.matching)
    image_N = torch.arange(shots * height * width, device=feature_KCHW.device) // (height * width)
    parts = []
    for image in range(shots):
        residual, matched = table.residuals((image_N == image).nonzero()[:, 0])
        if extractor.local_scale is not None:
            rest = (image_N != image).nonzero()[:, 0]
            norms, _ = table.residuals(rest, without=image)
            scale = torch.empty_like(image_N, dtype=norms.dtype)
            scale[rest] = extractor.local_scale.smoothed(norms.norm(dim=1)[None], height, width)[0]
            residual = residual / scale[matched][:, None]
        parts.append(residual)
    return as_map(torch.stack(parts), feature_KCHW)
