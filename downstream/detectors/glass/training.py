"""How GLASS trains: normal features against global and local anomalies (Chen et al. 2024).

A *global* anomaly is a normal feature with noise that climbs the gradient of the discriminator's loss, so that it comes
to look normal, and is kept between two distances by a projection. A *local* one is the feature of a picture with a
pasted texture (`synthesis`).

Distances are measured from the normal feature itself (form "manifold"), in the unit of the features, or from the centre
of the normal features at its position ("hypersphere"), in units of the distance that three quarters of the normal
features of the step lie within; then local anomalies are kept at twice these distances, as the authors' code does.

The adaptor learns from a global anomaly as from its normal feature: what noise, climb and projection add counts as
constant, which it is in the manifold form; the authors differentiate the projection around the centre too.

Shapes: b images of a step, H x W tokens, N tokens in the region, D channels of an embedding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.detectors.glass.config import GLASSConfig
from downstream.detectors.glass.synthesis import Textures, pasted
from downstream.detectors.refined import focal_loss
from downstream.embedding import Embedding
from downstream.learning import Learner
from downstream.lessons import Lesson, Normals

PROJECT_EVERY = 5  # steps of the ascent
QUANTILE = 0.75  # of the distances of normal features from the centre
SLOPE = 0.2  # of LeakyReLU below 0


class Discriminator(nn.Module):
    """Embeddings -> adapted features -> logits of an anomaly."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.adaptor = nn.Linear(width, width)
        body = (nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(SLOPE))
        self.head = nn.Sequential(*body, nn.Linear(hidden, 1, bias=False))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)

    def forward(self, embeddings_ND: Tensor) -> Tensor:
        """[N, D] -> logits [N]."""
        return self.judge(self.adaptor(embeddings_ND))

    def judge(self, adapted_ND: Tensor) -> Tensor:
        """Adapted features [N, D] -> logits [N]."""
        return self.head(adapted_ND)[:, 0]


def projected(features_ND: Tensor, anchors_ND: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Move features along the line from their anchor, until their distance is between ``low`` and ``high``."""
    away = features_ND - anchors_ND
    distance = away.norm(dim=1, keepdim=True)
    return anchors_ND + away * (torch.minimum(torch.maximum(distance, low), high) / (distance + 1e-10))


class Training(Learner):
    """The discriminator, and its loss on the images of a step."""

    def __init__(
        self, network: Discriminator, embedding: Embedding, config: GLASSConfig, textures: Textures, normals: Normals
    ) -> None:
        super().__init__()
        self.network, self.embedding, self.config, self.textures = network, embedding, config, textures
        self.mean_HWD = mean_embedding(normals, embedding) if config.form == "hypersphere" else None

    def forward(self, lesson: Lesson) -> Tensor:
        """Binary cross-entropy of normal features and global anomalies, and focal loss of the local ones."""
        network, region = self.network, lesson.region
        normal_bHWD = self.embedding(lesson.features).float()
        inside_bHW = None if region is None else region.inside(normal_bHWD[..., 0])
        numbers = [(self.config.training.seed, lesson.step, number) for number in lesson.numbers]
        made = pasted(lesson.images, numbers, self.textures, region)
        made_bHWD = self.embedding(lesson.normals.source.extract(made.images)).float()
        size = (normal_bHWD.shape[1], normal_bHWD.shape[2])
        marked_bHW = F.adaptive_max_pool2d(made.masks[:, None].float(), size)[:, 0] > 0

        def rows(x_bHW: Tensor) -> Tensor:
            return x_bHW.flatten(0, 2) if inside_bHW is None else x_bHW[inside_bHW]

        normal_ND, local_ND = network.adaptor(rows(normal_bHWD)), network.adaptor(rows(made_bHWD))
        anchors_ND, low, high = self._shell(normal_ND.detach(), normal_bHWD, rows)
        noise_ND = torch.randn(normal_ND.shape, generator=lesson.generator).to(normal_ND) * self.config.noise
        climbed_ND = self.climbed(normal_ND.detach(), noise_ND, anchors_ND, low, high)
        global_ND = normal_ND + (climbed_ND - normal_ND.detach())
        of_normal, of_global = network.judge(torch.cat([normal_ND, global_ND])).float().chunk(2)
        marked_N = rows(marked_bHW)
        if self.config.form == "hypersphere":
            local_ND = torch.where(marked_N[:, None], projected(local_ND, anchors_ND, 2 * low, 2 * high), local_ND)
        of_local = network.judge(local_ND).float()
        return F.softplus(of_normal).mean() + F.softplus(-of_global).mean() + self._focal(of_local, marked_N)

    def _shell(self, normal_ND: Tensor, normal_bHWD: Tensor, rows: Any) -> tuple[Tensor, Tensor, Tensor]:
        """What distances of anomalies are measured from [N, D], and the least and the largest distance."""
        low, high = (torch.tensor(radius, device=normal_ND.device) for radius in self.config.radii)
        if self.mean_HWD is None:
            return normal_ND, low, high
        with torch.no_grad():  # the adaptor is linear: of the mean it makes the mean of what it makes of all
            centre_ND = self.network.adaptor(rows(self.mean_HWD.expand_as(normal_bHWD))).to(normal_ND.dtype)
        unit = quantile((normal_ND - centre_ND).norm(dim=1), QUANTILE)
        return centre_ND, low * unit, high * unit

    def climbed(self, normal_ND: Tensor, noise_ND: Tensor, anchors_ND: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Climb from noisy features towards what the discriminator takes for normal, with projections."""
        found_ND = normal_ND + noise_ND
        for step in range(self.config.climb_steps):
            found_ND = found_ND.detach().requires_grad_()
            of_global = self.network.judge(torch.cat([normal_ND, found_ND]))[len(normal_ND) :]
            (uphill_ND,) = torch.autograd.grad(F.softplus(-of_global.float()).mean(), [found_ND])
            found_ND = found_ND.detach() + self.config.climb_rate * F.normalize(uphill_ND, dim=1)
            if (step + 1) % PROJECT_EVERY == 0:
                found_ND = projected(found_ND, anchors_ND, low, high)
        return found_ND

    def _focal(self, logits_N: Tensor, marked_N: Tensor) -> Tensor:
        """The focal loss of the tokens that are judged worst, a share 1 - ``easy`` of them."""
        error_N = (logits_N.detach().sigmoid() - marked_N.float()).abs()
        hard = error_N >= quantile(error_N, self.config.easy)
        return focal_loss(logits_N[hard], marked_N[hard])

    def groups(self) -> list[dict[str, Any]]:
        adaptor, head = list(self.network.adaptor.parameters()), list(self.network.head.parameters())
        slow = {"lr": self.config.adaptor_rate, "weight_decay": 1e-5}
        return [{"params": adaptor, **slow}, {"params": head, "lr": self.config.learning_rate}]


def quantile(values_N: Tensor, share: float) -> Tensor:
    """The smallest of the values that at least this share of the others does not exceed: a scalar."""
    return values_N.sort().values[math.ceil(share * (len(values_N) - 1))]


@torch.no_grad()
def mean_embedding(normals: Normals, embedding: Embedding) -> Tensor:
    """The mean embedding of the normal images at every position, of those images whose region it is in: [H, W, D]."""
    total, count = torch.zeros(()), torch.zeros(())
    for number in range(len(normals)):
        one_1HWD = embedding(normals.features([number])).float()
        region = normals.region and normals.region.pick([number])
        seen_HW1 = torch.ones_like(one_1HWD[0, ..., :1])
        if region is not None:
            seen_HW1 = region.inside(one_1HWD[..., 0])[0, ..., None].float()
        total, count = total.to(one_1HWD) + one_1HWD[0] * seen_HW1, count.to(one_1HWD) + seen_HW1
    return total / count.clamp_min(1)
