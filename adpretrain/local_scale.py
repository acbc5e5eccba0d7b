"""The local scale: residuals divided by how much the product itself varies where the reference was matched.

ADPretrain feeds residuals to the projector as they come. What varies from one good part to the next (an edge, a print,
a highlight) then counts as much as the same residual on a calm surface, and a fixed radius r in the norm loss fits the
scale of a backbone, level and product only by luck. `LocalScale` solves both. It is an option of the extractor
and changes residuals only: a photograph that differs from its references everywhere stays different everywhere.

Shapes: L levels, R = 1 or B banks of N = K * T reference tokens, T = H * W tokens per photograph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adpretrain.backbones.base import FeatureMaps
from adpretrain.config import LocalScaleConfig
from adpretrain.leave_one_out import LeaveOneOut, leave_one_out_residuals, residuals_to
from adpretrain.residual import residual_features, tokens

EPS = 1e-6


class LocalScale(nn.Module):
    """Estimates, for each level and reference token, the norm of a normal residual there.

    The estimate mixes the mean leave-one-out residual norm in the token's own 3 x 3 neighbourhood (``config.share``)
    with the mean over all references (the rest), because K photographs tell little about one place and much about the
    whole. A scaled normal residual has norm about 1 on calm and busy places and products alike. With a single reference
    nothing can be left out: its tokens are matched within the photograph, and the norms multiplied by ``single`` (a
    saved tensor, one number per level), the ratio of the two kinds of norm on normal pretraining images (`fit`). The
    extractor's output, projected or not, is multiplied by ``config.weights``.

    Raises ValueError if there are weights, but not exactly one for each of the ``levels``.
    """

    def __init__(self, levels: int, config: LocalScaleConfig | None = None) -> None:
        super().__init__()
        self.config = config or LocalScaleConfig()
        self.weights = list(self.config.weights) or [1.0] * levels
        if len(self.weights) != levels:
            raise ValueError(f"local_scale.weights {self.weights} must be one for each of the {levels} levels")
        self.single: Tensor
        self.register_buffer("single", torch.ones(levels))

    def smoothed(self, norms_RN: Tensor, height: int, width: int, inside_N: Tensor | None = None) -> Tensor:
        """Leave-one-out residual norms of whole photographs -> the divisors of residuals [R, N]. Both means are those
        of the tokens inside (None = all); a divisor of a token outside is meaningless."""
        if inside_N is None:
            around, mean = _neighbourhoods(norms_RN, height, width), norms_RN.mean(1, keepdim=True)
        else:
            inside_1N = inside_N.to(norms_RN.dtype)[None]
            share = _neighbourhoods(inside_1N, height, width).clamp_min(EPS)
            around = _neighbourhoods(norms_RN * inside_1N, height, width) / share
            mean = norms_RN[:, inside_N].mean(1, keepdim=True)
        return torch.lerp(mean, around, self.config.share).clamp_min(EPS)

    def scales(
        self,
        references: Sequence[Tensor],
        grids: Sequence[tuple[int, int]],
        metric: str = "l2",
        inside: Sequence[Tensor] | None = None,
        tables: Sequence[LeaveOneOut] | None = None,
    ) -> list[Tensor]:
        """The divisor of every reference token, L levels [R, N_l], for feature maps of H_l x W_l = ``grids`` tokens.
        ``inside``: which tokens of the references count, L levels [N_l]. ``tables``: those of the levels, if known.

        Raises ValueError if a bank is not a whole number of photographs.
        """
        out = []
        for level, (bank_RNC, (height, width)) in enumerate(zip(references, grids, strict=True)):
            images = bank_RNC.shape[1] // (height * width)
            ratio = self.single[level] if images == 1 else 1.0
            mask = None if inside is None else inside[level]
            table = LeaveOneOut.of(bank_RNC, images, metric, mask) if tables is None else tables[level]
            norms = residuals_to(bank_RNC, table.matches()).norm(dim=2)
            out.append(self.smoothed(norms * ratio, height, width, mask))
        return out

    def weighted(self, features: FeatureMaps) -> FeatureMaps:
        """The extractor's output with each level times its weight."""
        return [level if weight == 1 else level * weight for level, weight in zip(features, self.weights, strict=True)]

    @torch.no_grad()
    def fit(self, batches: Iterable[FeatureMaps], metric: str = "l2") -> LocalScale:
        """Measure ``single`` on batches of features; each batch holds normal images of one product (>= 2).

        It is the ratio of the mean norm between two photographs to the mean norm within one, averaged over products.
        """
        ratios = []
        for batch in batches:
            first, second = ([level[i : i + 1] for level in batch] for i in (0, 1))
            bank = [tokens(level) for level in second]
            between = [r.norm(dim=1).mean() for r in residual_features(first, bank, metric)]
            within = [leave_one_out_residuals(level, 1, metric).norm(dim=2).mean() for level in bank]
            ratios.append(torch.stack(between) / torch.stack(within).clamp_min(EPS))
        self.single.copy_(torch.stack(ratios).mean(0))
        return self


def _neighbourhoods(norms_RN: Tensor, height: int, width: int) -> Tensor:
    """The mean of the 3 x 3 tokens around each: [R, N]."""
    maps = norms_RN.view(-1, 1, height, width)
    return F.avg_pool2d(F.pad(maps, (1, 1, 1, 1), mode="replicate"), 3, stride=1).view_as(norms_RN)
