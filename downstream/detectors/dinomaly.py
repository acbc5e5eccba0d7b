"""Dinomaly: a decoder of linear attention reconstructs a vision transformer's frozen features (Guo et al. 2025).

Mean of all levels -> noisy bottleneck, a perceptron with dropout -> blocks of linear attention, which cannot focus and
so spread over the image -> the mean of each half of their outputs reconstructs the mean of a half of the levels, deep
blocks the shallow levels (loose constraint) -> cosine distances.

The authors take eight middle blocks of a DINOv2 with registers, blocks 3 to 10 of `dinov2-reg-base`. Their decoder also
sees the class and register tokens, which our backbones drop. Their optimiser is StableAdamW; ours is AdamW with the
norm of the gradient clipped. They upsample with aligned corners, we do without.

Shapes: B images, L levels, C channels, T = H x W tokens, S side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.progress import Progress
from downstream.detector import Detector, NormalFeatures, Prediction
from downstream.embedding import chosen_levels
from downstream.learning import Learner, learn
from downstream.lessons import LearningConfig, Lesson, Normals
from downstream.maps import SIGMA, check_sigma, check_top, gaussian_blur, highest
from downstream.network_weights import NETWORK, drawn_network, weights_of, with_weights
from downstream.reconstruction import Pair, cosine_distance, eased, global_loss, inside_of, summed_maps, within
from downstream.roi import RegionOfInterest

HEAD = 64  # channels of an attention head, as in the encoders
WARM_UP, RISE = 0.01, 0.1  # of all steps: the learning rate rises, the share of easy places rises
LAST_RATE = 0.1  # the learning rate at the end, as a share of the highest


@dataclass(frozen=True)
class DinomalyConfig:
    """Options of `Dinomaly`. The defaults are those of the paper for one model of several products.

    Args:
        levels: levels of the extract, counted from 0, shallow first; null = all.
        depth: number of blocks of the decoder.
        dropout: share of the bottleneck's values that are set to zero at random in training.
        easy: share of places, those with the smallest distances of the batch, whose gradients shrink, after the first
            tenth of the steps, in which it rises from 0.
        shrink: factor of their gradients.
        learning_rate: highest learning rate; it rises in the first hundredth of the steps and decays to a tenth.
        top: the image score is the mean of this share of the highest map values; 0 = the maximum.
        sigma: standard deviation of the Gaussian that smooths the maps, in pixels.
        training: steps, images per step and seed. The paper takes half of the steps for a single product.
    """

    levels: list[int] | None = None
    depth: int = 8
    dropout: float = 0.2
    easy: float = 0.9
    shrink: float = 0.1
    learning_rate: float = 2e-3
    top: float = 0.01
    sigma: float = SIGMA
    training: LearningConfig = field(default_factory=lambda: LearningConfig(steps=10_000, clip=0.1))

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        check_top(self.top)
        if self.depth < 2:
            raise ValueError(f"depth {self.depth} must be at least 2, one block for each half of the levels")
        for name in ("dropout", "easy"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be a share, at least 0 and below 1")
        if not 0 <= self.shrink <= 1:
            raise ValueError(f"shrink {self.shrink} must be a factor from 0 (no gradient) to 1")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate {self.learning_rate} must be positive")


DEFAULT = DinomalyConfig()


class LinearAttention(nn.Module):
    """Attention whose similarity of query and key is the product of elu + 1 of both: its cost is linear in T."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(heads for heads in range(1, max(1, channels // HEAD) + 1) if channels % heads == 0)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x_BTC: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x_BTC).chunk(3, dim=2)
        )
        query, key = F.elu(query) + 1, F.elu(key) + 1
        total = (query * key.sum(2, keepdim=True)).sum(3, keepdim=True)
        found = query @ (key.transpose(2, 3) @ value) / total
        return self.out(found.transpose(1, 2).flatten(2))


def perceptron(channels: int) -> nn.Sequential:
    inner = 4 * channels
    return nn.Sequential(nn.Linear(channels, inner, bias=False), nn.GELU(), nn.Linear(inner, channels, bias=False))


class Block(nn.Module):
    """A transformer block before whose parts the tokens are normalised."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.attention = nn.LayerNorm(channels, eps=1e-8), LinearAttention(channels)
        self.second, self.mlp = nn.LayerNorm(channels, eps=1e-8), perceptron(channels)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attention(self.first(x_BTC))
        return x_BTC + self.mlp(self.second(x_BTC))


class Decoder(Learner):
    """Bottleneck and blocks; the loss of a step is the global cosine distance of both halves."""

    def __init__(self, channels: int, config: DinomalyConfig) -> None:
        super().__init__()
        self.config = config
        first, act, last = perceptron(channels)
        noise = nn.Dropout(config.dropout)
        self.bottleneck = nn.Sequential(noise, first, act, noise, last, noise)
        self.blocks = nn.ModuleList(Block(channels) for _ in range(config.depth))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.03, b=0.03)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [*self.parameters()], "lr": self.config.learning_rate}]

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.groups(), weight_decay=1e-4, amsgrad=True)

    def rate(self, done: float) -> float:
        if done < WARM_UP:
            return done / WARM_UP
        return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2

    def forward(self, lesson: Lesson) -> Tensor:
        return self.loss(self.pairs(lesson.features, lesson.region), lesson.region, lesson.done)

    def loss(self, pairs: Sequence[Pair], region: RegionOfInterest | None, done: float) -> Tensor:
        """The mean of the global cosine distances of pairs, after a share of the steps."""
        share = self.config.easy * min(1.0, done / RISE)
        losses = []
        for target, found in pairs:
            (inside_BHW,) = inside_of([target], region)
            easy_BHW = easy_places((target, found), inside_BHW, share)
            losses.append(global_loss((target, eased(found, easy_BHW, self.config.shrink)), inside_BHW))
        return torch.stack(losses).mean()

    def pairs(self, features: FeatureMaps, region: RegionOfInterest | None) -> list[Pair]:
        """Targets and reconstructions [B, C, H, W], of two halves, or of one if there is a single level."""
        levels = [level.float() for level in chosen_levels(features, self.config.levels)]
        inside = inside_of(levels, region)
        height = levels[0].shape[2]
        x_BTC = torch.stack(within(levels, inside)).mean(0).flatten(2).transpose(1, 2)
        x_BTC = self.bottleneck(x_BTC)
        outputs = []
        for block in self.blocks:
            x_BTC = block(x_BTC)
            outputs.append(x_BTC.transpose(1, 2).unflatten(2, (height, -1)))
        count = min(2, len(levels))
        return list(zip(halves(levels, count), halves(outputs[::-1], count), strict=True))


def halves(maps: Sequence[Tensor], count: int) -> list[Tensor]:
    """The means of the first and the second half of maps; of all, if ``count`` is 1."""
    cuts = [len(maps) * part // count for part in range(count + 1)]
    return [torch.stack([*maps[a:b]]).mean(0) for a, b in pairwise(cuts)]


@torch.no_grad()
def easy_places(pair: Pair, inside_BHW: Tensor, share: float) -> Tensor:
    """The ``share`` of the places inside the region, of all images of the batch together, with the smallest distances:
    bool [B, H, W]."""
    distance_BHW = cosine_distance(*pair)
    values = distance_BHW[inside_BHW > 0]
    hard = max(1, int(len(values) * (1 - share)))
    return distance_BHW < values.topk(hard).values[-1]


class Dinomaly(Detector):
    """Levels of one grid and their reconstruction -> cosine distances of two groups, upsampled and averaged -> smoothed
    map -> the mean of its highest values.

    One product or several: fit it on the normal images of all of them for one model of all. Fitting keeps the images
    in memory. ``losses`` [steps] are those of the last `fit`.
    """

    name = "dinomaly"
    options = DinomalyConfig
    learns = True

    model: Decoder

    def __init__(self, extract: Extract, config: DinomalyConfig = DEFAULT) -> None:
        super().__init__(extract, config)
        self.losses: list[float] = []

    def fit_features(self, normals: NormalFeatures, progress: Progress | None) -> None:
        """Train bottleneck and decoder. Raises ValueError for levels of different shapes, or a loss that is not
        finite."""
        images = Normals(normals)
        levels = chosen_levels(images.features([0]), self.config.levels)
        check_one_grid(levels)
        make = partial(Decoder, levels[0].shape[1], self.config)
        model = drawn_network(make, self.config.training.seed, images.images.device)
        self.losses = learn(
            model, images, self.config.training, "training dinomaly", self.workplace, progress, self.config
        )
        self.model = model.requires_grad_(False)

    def from_features(self, features: FeatureMaps, region: RegionOfInterest | None = None) -> Prediction:
        pairs = self.model.pairs(features, region)
        maps = gaussian_blur(summed_maps(pairs, self.side, region) / len(pairs), self.config.sigma)
        return Prediction(highest(maps, self.config.top, region), maps)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the weights of bottleneck and decoder, which KNOW THE PRODUCT'S FEATURES."""
        return weights_of(self.model), {}

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        channels = len(tensors[f"{NETWORK}blocks.0.first.weight"])
        self.model = with_weights(partial(Decoder, channels, self.config), tensors).requires_grad_(False)


def check_one_grid(levels: FeatureMaps) -> None:
    """Raise ValueError unless all levels have the same shape."""
    shapes = [tuple(level.shape[1:]) for level in levels]
    if len(set(shapes)) > 1:
        found = ", ".join(" x ".join(map(str, shape)) for shape in shapes)
        raise ValueError(
            f"dinomaly takes levels of one shape, such as the blocks of a vision transformer, got {found} (C x H x W): "
            "choose a dinov2 backbone or one of the levels; for pyramids there are recontrast and rd4ad"
        )
