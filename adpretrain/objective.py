"""The pretraining objective over all levels (ADPretrain Eq. 7), with the centres of the angle loss.

Shapes: B images, V views, L levels, C_l channels, N = B * H_l * W_l tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from adpretrain.backbones import FeatureMaps
from adpretrain.batches import LabelledBatch
from adpretrain.config import LossConfig
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


class Objective:
    """Angle and norm losses of projected views; keeps the extractor's centres up to date if they are running means."""

    def __init__(self, config: LossConfig, extractor: ADExtractor) -> None:
        self.config, self.extractor = config, extractor

    def __call__(self, projected: list[FeatureMaps], batch: LabelledBatch) -> Losses:
        """V lists of L projected levels [B, C_l, H_l, W_l] and their labels -> losses.

        Raises FloatingPointError naming the level if a loss is not finite.
        """
        totals, angles, norms = [], [], []
        for level in range(len(projected[0])):
            features = [tokens(view[level]).flatten(0, 1).float() for view in projected]
            angle = self._angle(level, features, batch.angle_labels[level].flatten())
            parts = [self._norm(view, batch.labels[level].flatten()) for view in features]
            total = total_loss(angle, parts[0], parts[-1], self.config.lambda_)
            if not total.isfinite():
                raise FloatingPointError(
                    f"level {level}: angle loss {float(angle)}, norm losses {list(map(float, parts))}"
                )
            totals.append(total)
            angles.append(angle.detach())
            norms.append((parts[0].detach() + parts[-1].detach()) / 2)
        return Losses(torch.stack(totals).sum(), torch.stack(angles).sum(), torch.stack(norms).sum())

    def _norm(self, features_ND: Tensor, labels_N: Tensor) -> Tensor:
        return norm_loss(features_ND, labels_N, self.config.radius, self.config.margin, self.config.norm_form)

    def _angle(self, level: int, features: list[Tensor], labels_N: Tensor) -> Tensor:
        if not self.config.lambda_:
            return features[0].new_zeros(())
        center_C = getattr(self.extractor, f"center_{level}")
        if self.config.center == "projected":
            with torch.no_grad():
                mean = torch.cat([view[~labels_N] for view in features]).mean(0)
                center_C.lerp_(mean, 1 - CENTER_MOMENTUM)
        return angle_loss(
            features[0], features[1], labels_N, center_C.clone(), self.config.temperature, self.config.angle_form
        )


@torch.no_grad()
def measure_centers(extractor: ADExtractor, batches: Iterable[LabelledBatch]) -> None:
    """Set the centres to the mean unprojected normal residual of each level (the released code's choice)."""
    sums = [torch.zeros(width, dtype=torch.float64) for width in extractor.channels]
    counts = [0 for _ in sums]
    for batch in batches:
        for level, (residual, labels) in enumerate(zip(batch.views[0], batch.labels, strict=True)):
            normal = tokens(residual)[~labels.flatten(1)].double()
            sums[level] += normal.sum(0).cpu()
            counts[level] += normal.shape[0]
    for level, (total, count) in enumerate(zip(sums, counts, strict=True)):
        getattr(extractor, f"center_{level}").copy_(total / max(count, 1))
