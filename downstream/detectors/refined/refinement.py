"""A small network that sharpens anomaly maps, and what it learns from: ReConPatch suppl. D.

It sees the image and the detector's map, and says of each pixel whether it belongs to a defect.

The supplement names two residual blocks, parallel atrous convolutions with different rates (ASPP), focal and L1 loss
and the optimiser. It is silent about widths, rates, what the network sees, the resolution it works at, and how the
losses are weighted [ours]. Groups are normalised instead of batches, so a map does not depend on its company.

Shapes: B images, S side in pixels, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.detectors.refined.simulation import SimulationConfig

GROUPS = 8


@dataclass(frozen=True)
class RefinementConfig:
    """The network and its training; the paper's values where it gives any, [ours] where it does not.

    Args:
        width: C of all layers [ours], a multiple of 8.
        rates: dilations of the parallel convolutions; 1 = a 1 x 1 convolution [ours: DeepLab's].
        stride: of the first block: 2 works at half resolution, a quarter of the time; the map is upsampled [ours].
        focusing: gamma of the focal loss; 0 = plain cross-entropy [ours: Lin et al. 2017].
        l1: weight of the L1 loss beside the focal loss [ours].
        epochs: times that every normal image is seen, each time with other defects.
        batch_size: images per step.
        learning_rate, momentum, weight_decay: of SGD.
        seed: of the first weights, the order of the images and the defects.
        simulation: how defects are made.
    """

    width: int = 32
    rates: tuple[int, ...] = (1, 6, 12, 18)
    stride: int = 2
    focusing: float = 2.0
    l1: float = 1.0
    epochs: int = 500
    batch_size: int = 16
    learning_rate: float = 1e-2
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 0
    simulation: SimulationConfig = field(default_factory=SimulationConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", tuple(self.rates))  # JSON and YAML give lists
        if self.width < GROUPS or self.width % GROUPS:
            raise ValueError(f"width {self.width} must be a positive multiple of {GROUPS}")
        if not self.rates or min(self.rates) < 1:
            raise ValueError(f"rates {self.rates} must be dilations of at least 1, such as (1, 6, 12, 18)")
        for name in ("stride", "batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("focusing", "l1", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")
        if not 0 < self.learning_rate < math.inf or not 0 <= self.momentum < 1:
            raise ValueError(
                f"learning_rate {self.learning_rate} must be positive, momentum {self.momentum} in 0..1 (1 excluded)"
            )


DEFAULT = RefinementConfig()


def _convolution(inner: int, outer: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    layer = nn.Conv2d(inner, outer, kernel, stride, padding, dilation, bias=False)
    return nn.Sequential(layer, nn.GroupNorm(GROUPS, outer))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut: [B, inner, h, w] -> [B, outer, ceil(h / stride), ceil(w / stride)]."""

    def __init__(self, inner: int, outer: int, stride: int = 1) -> None:
        super().__init__()
        self.first = _convolution(inner, outer, 3, stride)
        self.second = _convolution(outer, outer, 3)
        plain = inner == outer and stride == 1
        self.shortcut: nn.Module = nn.Identity() if plain else _convolution(inner, outer, 1, stride)

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(maps))) + self.shortcut(maps))


class AtrousPyramid(nn.Module):
    """Parallel dilated convolutions, joined by a 1 x 1 convolution (ASPP): [B, C, h, w] -> [B, C, h, w]."""

    def __init__(self, width: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            _convolution(width, width, 1 if rate == 1 else 3, dilation=rate) for rate in rates
        )
        self.join = _convolution(len(rates) * width, width, 1)

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.join(F.relu(torch.cat([branch(maps) for branch in self.branches], 1))))


class RefinementNetwork(nn.Module):
    """Image and anomaly map -> logits of a defect, per pixel."""

    def __init__(self, config: RefinementConfig = DEFAULT) -> None:
        super().__init__()
        width = config.width
        self.blocks = nn.Sequential(ResidualBlock(4, width, config.stride), ResidualBlock(width, width))
        self.pyramid = AtrousPyramid(width, config.rates)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, images: Tensor, maps_BSS: Tensor) -> Tensor:
        """[B, 3, S, S], [B, S, S] -> logits [B, S, S]."""
        seen = torch.cat([images, maps_BSS[:, None]], 1)
        logits = self.head(self.pyramid(self.blocks(seen)))
        return F.interpolate(logits, size=maps_BSS.shape[1:], mode="bilinear", align_corners=False)[:, 0]


def build_network(config: RefinementConfig) -> RefinementNetwork:
    """A fresh network from the config's seed; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return RefinementNetwork(config)


def focal_loss(logits: Tensor, masks: Tensor, focusing: float = 2.0) -> Tensor:
    """Mean over pixels of -(1 - p)^gamma log p, p the probability given to the truth (Lin et al. 2017, Eq. 4).

    Logits and bool masks of equal shape. Computed from logits, so certainty neither overflows nor loses its gradient.
    """
    towards_truth = torch.where(masks, logits, -logits)
    log_p = F.logsigmoid(towards_truth)
    return (-torch.sigmoid(-towards_truth).pow(focusing) * log_p).mean()


def refinement_loss(logits: Tensor, masks: Tensor, config: RefinementConfig = DEFAULT) -> Tensor:
    """Focal loss + weight x mean absolute difference of probability and mask: a scalar."""
    difference = (torch.sigmoid(logits) - masks.to(logits.dtype)).abs().mean()
    return focal_loss(logits, masks, config.focusing) + config.l1 * difference
