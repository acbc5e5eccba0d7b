"""The pretraining objective over all levels (ADPretrain Eq. 7), with the centres of the angle loss.

Shapes: B images, V views, L levels, C_l channels, N = B * H_l * W_l tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from adpretrain.backbones import FeatureMaps
from adpretrain.config import LossConfig
from adpretrain.device import upload
from adpretrain.extractor import ADExtractor
from adpretrain.losses import angle_loss, norm_loss, total_loss
from adpretrain.residual import tokens
from adpretrain.training.batches import LabelledBatch, ResidualBatch
from adpretrain.training.distributed import Group, everyone, processes, total

CENTER_MOMENTUM = 0.99


@dataclass(frozen=True)
class Losses:
    """``share``: this process's part of the loss, to be differentiated; ``levels`` [L, 3]: (total, angle, norm) of the
    batch of all processes, without gradient and still on the device, because reading them waits for the step."""

    share: Tensor
    levels: Tensor

    def values(self) -> tuple[float, float, float]:
        """(total, angle, norm), summed over levels.

        Raises FloatingPointError naming the level if a loss is not finite, on all processes.
        """
        found = self.levels.cpu()
        if not found.isfinite().all():
            level = int((~found.isfinite()).any(1).nonzero()[0])
            _, angle, norm = found[level].tolist()
            raise FloatingPointError(f"level {level}: angle loss {angle}, norm loss {norm}")
        total, angle, norm = found.sum(0).tolist()
        return total, angle, norm


class Objective:
    """Angle and norm losses of projected views; updates the extractor's centres if they are running means.

    ``group``: the processes that train together.
    """

    def __init__(self, config: LossConfig, extractor: ADExtractor, group: Group = None) -> None:
        self.config, self.extractor, self.group = config, extractor, group

    def __call__(self, projected: list[FeatureMaps], batch: LabelledBatch) -> Losses:
        """V lists of L projected levels [B, C_l, H_l, W_l] and their labels -> losses."""
        config = self.config
        shares, parts = [], []
        for level in range(len(projected[0])):
            features = [_at_least_float32(tokens(view[level]).flatten(0, 1)) for view in projected]
            angle = self._angle(level, features, batch.angle_labels[level].flatten())
            norms = [self._norm(view, batch.labels[level].flatten()) for view in features]
            share = total_loss(angle, norms[0], norms[-1], config.lambda_, config.norm_weight, config.total_form)
            shares.append(share)
            parts.append(torch.stack([share, angle, (norms[0] + norms[-1]) / 2]).detach())
        return Losses(torch.stack(shares).sum(), total(torch.stack(parts), self.group))

    def _norm(self, features_ND: Tensor, labels_N: Tensor) -> Tensor:
        config = self.config
        if not config.norm_weight:
            return features_ND.new_zeros(())
        return norm_loss(features_ND, labels_N, config.radius, config.margin, config.norm_form, self.group)

    def _angle(self, level: int, features: list[Tensor], labels_N: Tensor) -> Tensor:
        config = self.config
        if not config.lambda_:
            return features[0].new_zeros(())
        center_C = getattr(self.extractor, f"center_{level}")
        if config.center == "projected":
            self._update_center(center_C, features, labels_N)
        group, share = (self.group, 1) if config.cross_process else (None, processes(self.group))
        loss = angle_loss(
            features[0],
            features[1],
            labels_N,
            center_C.clone(),
            config.temperature,
            config.angle_form,
            group=group,
        )
        return loss / share

    def _update_center(self, center_C: Tensor, features: list[Tensor], labels_N: Tensor) -> None:
        """Move a centre towards the mean of the batch's normal features, if it has any."""
        normal = upload((~labels_N).nonzero()[:, 0], center_C.device)
        count = len(features) * sum(number for (number,) in everyone([len(normal)], self.group))
        if count:
            sum_C = total(torch.stack([view.detach()[normal].sum(0) for view in features]).sum(0), self.group)
            center_C.lerp_((sum_C / count).to(center_C.dtype), 1 - CENTER_MOMENTUM)


def _at_least_float32(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))


@torch.no_grad()
def measure_centers(extractor: ADExtractor, batches: Iterable[ResidualBatch], group: Group = None) -> None:
    """Set the centres to the mean unprojected residual of each level over batches of normal images, those of all
    processes of ``group`` (the released code's choice; all tokens, in float64)."""
    centers = [getattr(extractor, f"center_{level}") for level in range(len(extractor.channels))]
    sums = [torch.zeros_like(center, dtype=torch.float64) for center in centers]
    counts = [0 for _ in sums]
    for batch in batches:
        for level, residual in enumerate(batch.views[0]):
            rows = tokens(residual).flatten(0, 1)
            sums[level] += rows.sum(0, dtype=torch.float64)
            counts[level] += rows.shape[0]
    every = everyone(counts, group)
    for center, sum_C, count in zip(centers, sums, zip(*every, strict=True), strict=True):
        if any(count):
            center.copy_(total(sum_C, group) / sum(count))
