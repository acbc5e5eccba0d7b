"""The pretraining objective over all levels (ADPretrain Eq. 7), with the centres of the angle loss.

Shapes: B images, V views, L levels, C_l channels, G = H_l * W_l tokens, N = B * G.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from adpretrain.backbones import FeatureMaps
from adpretrain.batches import EncodedBatch
from adpretrain.config import LossConfig
from adpretrain.data.pairs import token_labels
from adpretrain.extractor import ADExtractor
from adpretrain.losses import angle_loss, norm_loss, total_loss
from adpretrain.residual import tokens

CENTER_MOMENTUM = 0.99


@dataclass(frozen=True)
class Losses:
    """Sums over levels: what is minimised, and its two parts."""

    total: Tensor
    angle: Tensor
    norm: Tensor


def batch_residuals(extractor: ADExtractor, batch: EncodedBatch) -> tuple[list[FeatureMaps], list[FeatureMaps]]:
    """Residuals of every view (V lists of L levels [B, C_l, H_l, W_l]) and, for cross attention, the context.

    The second list is empty unless the projector needs reference residuals; then it has one entry per group of K.
    """
    views: list[list[FeatureMaps]] = [[] for _ in batch.views]
    contexts: list[FeatureMaps] = []
    start = 0
    with torch.no_grad():
        for shots, banks in batch.groups:
            stop = start + banks[0].shape[0]
            scales = extractor.scales(banks, shots)
            for collected, view in zip(views, batch.views, strict=True):
                part = [level[start:stop] for level in view]
                collected.append(extractor.residuals(part, banks, scales))
            if extractor.projector is not None and extractor.projector.needs_reference_residuals:
                contexts.append(extractor.reference_residuals(banks, shots, scales))
            start = stop
    joined = [[torch.cat(level) for level in zip(*collected, strict=True)] for collected in views]
    return joined, contexts


class Objective:
    """Angle and norm losses of projected views; keeps the extractor's centres up to date if they are running means."""

    def __init__(self, config: LossConfig, extractor: ADExtractor) -> None:
        self.config, self.extractor = config, extractor

    def __call__(self, views: list[FeatureMaps], masks_BSS: Tensor) -> Losses:
        """V lists of L projected levels [B, C_l, H_l, W_l] and pixel masks -> losses.

        Raises FloatingPointError naming the level if a loss is not finite.
        """
        angle_sum, norm_sum, total_sum = (views[0][0].new_zeros((), dtype=torch.float32) for _ in range(3))
        for level in range(len(views[0])):
            features = [tokens(view[level]).flatten(0, 1).float() for view in views]
            grid = (int(views[0][level].shape[2]), int(views[0][level].shape[3]))
            angle, norms = self._level(level, features, masks_BSS, grid)
            total = total_loss(angle, norms[0], norms[-1], self.config.lambda_)
            if not total.isfinite():
                raise FloatingPointError(f"level {level}: angle loss {float(angle)}, norm losses {list(map(float, norms))}")
            angle_sum, total_sum = angle_sum + angle, total_sum + total
            norm_sum = norm_sum + (norms[0] + norms[-1]) / 2
        return Losses(total_sum, angle_sum.detach(), norm_sum.detach())

    def _level(
        self, level: int, features: list[Tensor], masks_BSS: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, list[Tensor]]:
        config = self.config
        nearest_N = token_labels(masks_BSS, grid).flatten()
        norms = [norm_loss(view, nearest_N, config.radius, config.margin, config.norm_form) for view in features]
        if not config.lambda_:
            return features[0].new_zeros(()), norms
        labels_N = token_labels(masks_BSS, grid, config.token_label, config.token_pixels).flatten()
        center_C = getattr(self.extractor, f"center_{level}")
        if config.center == "projected":
            with torch.no_grad():
                mean = torch.cat([view[~labels_N] for view in features]).mean(0)
                center_C.lerp_(mean, 1 - CENTER_MOMENTUM)
        angle = angle_loss(features[0], features[1], labels_N, center_C.clone(), config.temperature, config.angle_form)
        return angle, norms


@torch.no_grad()
def measure_centers(extractor: ADExtractor, batches: Iterable[EncodedBatch]) -> None:
    """Set the centres to the mean unprojected normal residual of each level (the released code's choice)."""
    sums: list[Tensor] = []
    counts: list[int] = []
    for batch in batches:
        views, _ = batch_residuals(extractor, batch)
        for level, residual in enumerate(views[0]):
            normal = ~token_labels(batch.masks, (residual.shape[2], residual.shape[3]))
            rows = tokens(residual).double()[normal.flatten(1)]
            if level == len(sums):
                sums.append(torch.zeros_like(rows[0]))
                counts.append(0)
            sums[level] += rows.sum(0)
            counts[level] += rows.shape[0]
    for level, (total, count) in enumerate(zip(sums, counts, strict=True)):
        getattr(extractor, f"center_{level}").copy_(total / max(count, 1))
