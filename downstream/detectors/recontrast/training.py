"""The loss of a training step of RD4AD and ReContrast, in each of the configurations (`forms`).

Shapes: B images, L levels, H x W places of a level.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from adpretrain.backbones import Backbone, FeatureMaps
from downstream.detectors.recontrast.encoder import set_norms
from downstream.detectors.recontrast.forms import FORMS, ReContrastConfig
from downstream.detectors.recontrast.network import Reversed
from downstream.embedding import chosen_levels
from downstream.learning import Learner
from downstream.lessons import Lesson
from downstream.reconstruction import Pair, cosine_distance, eased, global_loss, inside_of, regional_loss, within
from downstream.roi import RegionOfInterest

FIRST_ALPHA, RISE = -3.0, 0.1  # of Eq. 5: alpha rises from there over this share of the steps
BETAS, WEIGHT_DECAY = (0.9, 0.999), 1e-5


class Contrast(Learner):
    """The network and, if it is trained, the encoder."""

    def __init__(self, network: Reversed, encoder: Backbone | None, config: ReContrastConfig) -> None:
        super().__init__()
        self.network, self.encoder, self.config = network, encoder, config
        self.form = FORMS[config.form]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.encoder is not None:  # a Backbone keeps evaluation mode otherwise
            set_norms(self.encoder, mode and self.config.batch_norm != "eval")
        return self

    def groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [{"params": [*self.network.parameters()], "lr": self.config.learning_rate}]
        if self.encoder is not None:
            weights = [weight for weight in self.encoder.parameters() if weight.requires_grad]
            groups.append({"params": weights, "lr": self.config.encoder_rate})
        return groups

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.groups(), betas=BETAS, weight_decay=WEIGHT_DECAY)

    def forward(self, lesson: Lesson) -> Tensor:
        features = [*lesson.features]
        if self.encoder is not None:
            features += self.encoder(lesson.images)
        return self.loss(self.pairs(features, lesson.region), lesson.region, lesson.done)

    def pairs(self, features: FeatureMaps, region: RegionOfInterest | None) -> list[Pair]:
        """Targets and reconstructions, L of each view. ``features``: levels of the extract [B, C_l, H_l, W_l], followed
        by those of the trained encoder, if there is one."""
        frozen, trained = self.split(features)
        if self.form.crosses:
            sources, targets = [trained, frozen], [frozen, trained]
        else:
            sources = targets = [trained if self.form.trains else frozen]
        inside = inside_of(frozen, region)
        found = self.network([within(levels, inside) for levels in sources])
        return [pair for levels, view in zip(targets, found, strict=True) for pair in zip(levels, view, strict=True)]

    def split(self, features: FeatureMaps) -> tuple[FeatureMaps, FeatureMaps]:
        """The chosen levels of the frozen and of the trained encoder; the latter [] if there is none."""
        count = len(features) // (2 if self.form.trains else 1)
        frozen, trained = features[:count], features[count:]
        chosen = chosen_levels(frozen, self.config.levels)
        return chosen, chosen_levels(trained, self.config.levels) if trained else []

    def loss(self, pairs: list[Pair], region: RegionOfInterest | None, done: float) -> Tensor:
        """The sum over pairs of Eq. 2, 3 or 4, with hard-normal mining (Eq. 5) if it is chosen."""
        losses = []
        inside = inside_of([target for target, _ in pairs], region)
        alpha = alpha_at(done, self.config.alpha)
        for (target, found), inside_BHW in zip(pairs, inside, strict=True):
            target = target.detach() if self.form.stops else target
            if self.config.hard_mining:
                found = eased(found, easy_places((target, found), inside_BHW, alpha), 0.0)
            losses.append((global_loss if self.form.whole else regional_loss)((target, found), inside_BHW))
        return torch.stack(losses).sum()


def alpha_at(done: float, last: float = 1.0) -> float:
    """alpha of Eq. 5 after a share of the steps: it rises linearly from -3 to ``last`` in the first tenth."""
    return FIRST_ALPHA + (last - FIRST_ALPHA) * min(1.0, done / RISE)


@torch.no_grad()
def easy_places(pair: Pair, inside_BHW: Tensor, alpha: float) -> Tensor:
    """The places of the batch whose distance is below its mean + alpha standard deviations (Eq. 5): bool [B, H, W].

    Mean and deviation are those of the places inside the region, of all images of the batch together.
    """
    distance_BHW, count = cosine_distance(*pair), inside_BHW.sum()
    mean = (distance_BHW * inside_BHW).sum() / count
    variance = ((distance_BHW - mean).square() * inside_BHW).sum() / (count - 1).clamp_min(1)
    return distance_BHW < mean + alpha * variance.sqrt()
