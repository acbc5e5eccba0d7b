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
from adpretrain.distributed import Group, processes, total
from adpretrain.extractor import ADExtractor
from adpretrain.losses import angle_loss, norm_loss, total_loss
from adpretrain.residual import tokens

CENTER_MOMENTUM = 0.99


@dataclass(frozen=True)
class Losses:
    """``share``: this process's part of the loss, to be differentiated; ``total``, ``angle`` and ``norm``: the loss of
    the batch of all processes and its two parts, without gradient. All are sums over levels."""

    share: Tensor
    total: Tensor
    angle: Tensor
    norm: Tensor


class Objective:
    """Angle and norm losses of projected views; keeps the extractor's centres up to date if they are running means.

    ``group``: the processes that train together.
    """

    def __init__(self, config: LossConfig, extractor: ADExtractor, group: Group = None) -> None:
        self.config, self.extractor, self.group = config, extractor, group

    def __call__(self, projected: list[FeatureMaps], batch: LabelledBatch) -> Losses:
        """V lists of L projected levels [B, C_l, H_l, W_l] and their labels -> losses.

        Raises FloatingPointError naming the level if a loss is not finite, on all processes.
        """
        shares, parts = [], []
        for level in range(len(projected[0])):
            features = [_at_least_float32(tokens(view[level]).flatten(0, 1)) for view in projected]
            angle = self._angle(level, features, batch.angle_labels[level].flatten())
            norms = [self._norm(view, batch.labels[level].flatten()) for view in features]
            share = total_loss(angle, norms[0], norms[-1], self.config.lambda_)
            shares.append(share)
            parts.append(torch.stack([share, angle, (norms[0] + norms[-1]) / 2]).detach())
        values_L3 = total(torch.stack(parts), self.group)
        if not values_L3.isfinite().all():
            level = int((~values_L3.isfinite()).any(1).nonzero()[0])
            _, angle, norm = values_L3[level].tolist()
            raise FloatingPointError(f"level {level}: angle loss {angle}, norm loss {norm}")
        return Losses(torch.stack(shares).sum(), *values_L3.sum(0).unbind())

    def _norm(self, features_ND: Tensor, labels_N: Tensor) -> Tensor:
        config = self.config
        return norm_loss(features_ND, labels_N, config.radius, config.margin, config.norm_form, self.group)

    def _angle(self, level: int, features: list[Tensor], labels_N: Tensor) -> Tensor:
        config = self.config
        if not config.lambda_:
            return features[0].new_zeros(())
        center_C = getattr(self.extractor, f"center_{level}")
        if config.center == "projected":
            normal = torch.cat([view.detach()[~labels_N] for view in features])
            mean = _mean(normal.sum(0), normal.shape[0], self.group)
            if mean is not None:
                center_C.lerp_(mean.to(center_C.dtype), 1 - CENTER_MOMENTUM)
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


def _at_least_float32(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _mean(sum_C: Tensor, count: int, group: Group) -> Tensor | None:
    """Mean over the rows of all processes, None without any."""
    whole = total(torch.cat([sum_C, sum_C.new_tensor([count])]), group)
    return whole[:-1] / whole[-1] if whole[-1] else None


@torch.no_grad()
def measure_centers(extractor: ADExtractor, batches: Iterable[LabelledBatch], group: Group = None) -> None:
    """Set the centres to the mean unprojected normal residual of each level (the released code's choice), over the
    batches of all processes of ``group``."""
    centers = [getattr(extractor, f"center_{level}") for level in range(len(extractor.channels))]
    sums = [torch.zeros_like(center, dtype=torch.float64) for center in centers]
    counts = [0 for _ in sums]
    for batch in batches:
        for level, (residual, labels) in enumerate(zip(batch.views[0], batch.labels, strict=True)):
            normal = tokens(residual)[~labels.flatten(1)].double()
            sums[level] += normal.sum(0)
            counts[level] += normal.shape[0]
    for center, sum_C, count in zip(centers, sums, counts, strict=True):
        mean = _mean(sum_C, count, group)
        if mean is not None:
            center.copy_(mean)
