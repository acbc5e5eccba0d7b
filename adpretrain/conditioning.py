"""Conditioning of features before and of residuals after matching: no drift between photographs, one scale for all.

ADPretrain feeds residuals to the projector as they come. With a fixed radius r in the norm loss this leaves the
scale of each backbone, level and product to luck, a photograph that is a little brighter, sharper or noisier than its
references looks anomalous everywhere, and so does whatever varies from one good part to the next. `Conditioning`
removes all three. It is an option of the extractor.

Shapes: C channels, L levels, R = 1 or B banks of N = K * T reference tokens, T tokens per image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adpretrain.backbones.base import FeatureMaps, References
from adpretrain.residual import leave_one_out_residuals, residual_features, tokens

LOCAL = 0.5  # share of the token's own neighbourhood in its scale
EPS = 1e-6


def _centred(feature_BCHW: Tensor) -> Tensor:
    # The lower median as torch.median has it, in operations that ONNX knows too; no slower.
    rows = feature_BCHW.flatten(2)
    lower_half = rows.topk((rows.shape[2] + 1) // 2, dim=2, largest=False, sorted=False).values
    return feature_BCHW - lower_half.amax(2)[..., None, None]


def smoothed_scale(norms_RN: Tensor, height: int, width: int) -> Tensor:
    """Leave-one-out residual norms of whole photographs -> scales [R, N]: half the mean, half the 3 x 3 average."""
    maps = norms_RN.view(-1, 1, height, width)
    around = F.avg_pool2d(F.pad(maps, (1, 1, 1, 1), mode="replicate"), 3, stride=1).view_as(norms_RN)
    return (LOCAL * around + (1 - LOCAL) * norms_RN.mean(1, keepdim=True)).clamp_min(EPS)


class Conditioning(nn.Module):
    """Per level: channels centred on their median over the photograph and divided by std sqrt(C), then residuals
    divided by how much the product itself varies around the matched reference.

    The median, unlike the mean, does not follow a defect that covers less than half of the picture. The statistics
    (``std`` per channel; ``single`` per level) come from normal pretraining images and are saved with the projector.

    What varies from one good part to the next (an edge, a print, a highlight) must not count as much as the same
    residual on a calm surface. So each reference token has a scale: half the mean leave-one-out residual norm of all
    references, half that of the token's own 3 x 3 neighbourhood. A normal residual then has norm about 1 on calm and
    on busy places and products alike. A single reference has nothing to leave out; its tokens are matched within the
    photograph and the norms multiplied by ``single``, the ratio of the two kinds of norm on the pretraining set.
    """

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.levels = len(channels)
        for level, width in enumerate(channels):
            self.register_buffer(f"std_{level}", torch.ones(width))
        self.single: Tensor
        self.register_buffer("single", torch.ones(len(channels)))

    def standardise(self, features: FeatureMaps) -> FeatureMaps:
        """L levels [B, C_l, H_l, W_l] -> (x - median over the photograph) / (std sqrt(C_l)), same shapes."""
        out = []
        for level, feature in enumerate(features):
            scale = getattr(self, f"std_{level}") * feature.shape[1] ** 0.5
            out.append(_centred(feature) / scale[:, None, None])
        return out

    def scales(self, references: References, grids: Sequence[tuple[int, int]], metric: str = "l2") -> list[Tensor]:
        """The scale of every reference token, L levels [R, N_l], for feature maps of H_l x W_l = ``grids`` tokens.

        Raises ValueError if a bank is not a whole number of photographs.
        """
        out = []
        for level, (bank_RNC, (height, width)) in enumerate(zip(references, grids, strict=True)):
            images = bank_RNC.shape[1] // (height * width)
            ratio = self.single[level] if images == 1 else 1.0
            norms = torch.stack([leave_one_out_residuals(bank, images, metric).norm(dim=1) for bank in bank_RNC])
            out.append(smoothed_scale(norms * ratio, height, width))
        return out

    @torch.no_grad()
    def fit(self, batches: Iterable[FeatureMaps], metric: str = "l2") -> Conditioning:
        """Measure the statistics on batches of raw features; each batch holds normal images of one product (>= 2).

        ``std`` is the root mean square of the centred channels over all tokens (in float64); ``single`` is the ratio
        of the mean norm between two photographs to the mean norm within one, averaged over products.
        """
        batches = list(batches)
        for level in range(self.levels):
            rows = torch.cat([tokens(_centred(batch[level])).flatten(0, 1) for batch in batches]).double()
            getattr(self, f"std_{level}").copy_(rows.square().mean(0).sqrt().clamp_min(EPS))
        ratios = []
        for batch in batches:
            first, second = (self.standardise([level[i : i + 1] for level in batch]) for i in (0, 1))
            bank = [tokens(level) for level in second]
            between = [r.norm(dim=1).mean() for r in residual_features(first, bank, metric)]
            within = [leave_one_out_residuals(level[0], 1, metric).norm(dim=1).mean() for level in bank]
            ratios.append(torch.stack(between) / torch.stack(within).clamp_min(EPS))
        self.single.copy_(torch.stack(ratios).mean(0))
        return self
