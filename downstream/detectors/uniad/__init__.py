"""UniAD: how far features are from what the rest of the image says that they are (You et al. 2022).

All levels on one grid, concatenated -> `transformer`, trained to reconstruct the features of normal images, of which
it sees a noisy version and never a token's own neighbourhood -> length of the difference, upsampled. The image score is
the largest mean of the map over a window, 16 of 224 pixels wide, as in the authors' evaluation.

The paper trains one network for all products of a benchmark; here it is trained for those of the normal images, which
may be several. Tokens outside the region of interest are not seen, reconstructed or scored.

Shapes: B images, S side in pixels, G x G grid of T = G^2 tokens, D channels of all levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.progress import Progress
from downstream.detector import Detector, NormalFeatures, Prediction
from downstream.detectors.uniad.transformer import Transformer
from downstream.embedding import chosen_levels, on_one_grid
from downstream.learning import Learner, learn
from downstream.lessons import LearningConfig, Lesson, Normals
from downstream.maps import check_sigma, highest, pixel_maps
from downstream.network_weights import drawn_network, weights_of, with_weights
from downstream.roi import RegionOfInterest

WINDOW = 1 / 14  # side of the window of the image score, as a share of the map's
FALL, FALLEN = 0.8, 0.1  # share of the steps after which the learning rate falls, and to what


@dataclass(frozen=True)
class UniADConfig:
    """Options of `UniAD`.

    Args:
        levels: levels of the extract, counted from 0 (-1 = the last); null = all. The paper takes the first four
            stages of an EfficientNet-B4.
        grid: G, the side of the grid that all levels are resized to; 14 for 224 pixels in the paper. Attention takes
            memory for G^4 numbers per image and head.
        neighbours: side of the square around a token that it does not see, odd.
        width: channels inside the network, a multiple of heads and of 2.
        heads: heads of an attention.
        layers: layers of the encoder, and of the decoder.
        inner: channels of the feed-forward networks.
        dropout: share of the values that are dropped in training.
        jitter: the noise on a feature in training has the standard deviation jitter * length of the feature / D in
            every channel; 0 = none.
        learning_rate, weight_decay: options of AdamW; after four fifths of the steps the rate falls to a tenth.
        sigma: standard deviation of the Gaussian that smooths the maps, in pixels; the paper smooths nothing.
        training: steps and images per step [ours]; the paper takes 1,000 passes over the images of all products.
    """

    levels: list[int] | None = None
    grid: int = 14
    neighbours: int = 7
    width: int = 256
    heads: int = 8
    layers: int = 4
    inner: int = 1024
    dropout: float = 0.1
    jitter: float = 20.0
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    sigma: float = 0.0
    training: LearningConfig = field(default_factory=lambda: LearningConfig(steps=5000, batch_size=8, clip=0.1))

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        for name, most in (("grid", 128), ("width", 8192), ("heads", 128), ("layers", 64), ("inner", 65536)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1, and at most {most}")
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width {self.width} must be a multiple of 2 and of heads {self.heads}")
        if self.neighbours < 1 or self.neighbours % 2 == 0 or self.neighbours // 2 >= self.grid // 2:
            raise ValueError(
                f"neighbours {self.neighbours} must be odd, such as 7, and smaller than grid {self.grid}: a token in "
                "the middle would see none"
            )
        if not 0 <= self.dropout < 1 or not 0 <= self.jitter < math.inf:
            raise ValueError(f"dropout {self.dropout} must be in 0..1 (1 excluded), jitter {self.jitter} not negative")
        if not 0 < self.learning_rate < math.inf or not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"learning_rate {self.learning_rate} must be positive, weight_decay {self.weight_decay} not negative"
            )


DEFAULT = UniADConfig()


def jittered(tokens_BTD: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise with deviation scale * ||token|| / D to every channel."""
    noise = torch.randn(tokens_BTD.shape, generator=generator).to(tokens_BTD)
    return tokens_BTD + noise * tokens_BTD.norm(dim=2, keepdim=True) / tokens_BTD.shape[2] * scale


class Reconstruction(Learner):
    """The transformer, and its loss: the mean squared difference of features and reconstructions in the region."""

    def __init__(self, channels: int, config: UniADConfig) -> None:
        super().__init__()
        self.config = config
        sizes = (config.width, config.heads, config.layers, config.inner)
        self.transformer = Transformer(channels, config.grid, config.neighbours, *sizes, config.dropout)

    def forward(self, lesson: Lesson) -> Tensor:
        tokens_BTD = tokens_of(lesson.features, self.config)
        inside_BT = inside_of(tokens_BTD, self.config, lesson.region)
        seen = jittered(tokens_BTD, self.config.jitter, lesson.generator)
        error_BT = (self.transformer(seen, inside_BT).float() - tokens_BTD).square().mean(2)
        return (error_BT.flatten() if inside_BT is None else error_BT[inside_BT.expand_as(error_BT)]).mean()

    def groups(self) -> list[dict[str, Any]]:
        rates = {"lr": self.config.learning_rate, "weight_decay": self.config.weight_decay}
        return [{"params": list(self.parameters()), **rates}]

    def rate(self, done: float) -> float:
        return 1.0 if done < FALL else FALLEN


def tokens_of(features: FeatureMaps, config: UniADConfig) -> Tensor:
    """L levels [B, C_l, H_l, W_l] -> all of them on the grid, concatenated: [B, T, D] float32."""
    levels = [level.float() for level in chosen_levels(features, config.levels)]
    return on_one_grid(levels, (config.grid, config.grid)).flatten(2).mT.contiguous()


def inside_of(tokens_BTD: Tensor, config: UniADConfig, region: RegionOfInterest | None) -> Tensor | None:
    """Which tokens are in the region: [B, T]; None = all."""
    return None if region is None else region.inside(grid_of(tokens_BTD[..., 0], config)).flatten(1)


def grid_of(values_BT: Tensor, config: UniADConfig) -> Tensor:
    """[B, T] -> [B, G, G]."""
    return values_BT.unflatten(1, (config.grid, config.grid))


class UniAD(Detector):
    """Features -> reconstructions -> length of the difference, upsampled -> largest mean over a window.

    ``losses`` [steps] are those of the last `fit`.
    """

    name = "uniad"
    options = UniADConfig
    learns = True

    reconstruction: Reconstruction

    def __init__(self, extract: Extract, config: UniADConfig = DEFAULT) -> None:
        super().__init__(extract, config)
        self.losses: list[float] = []

    def fit_features(self, normals: NormalFeatures, progress: Progress | None) -> None:
        """Train the transformer on the features of the normal images."""
        config, training, lessons = self.config, self.config.training, Normals(normals)
        channels = tokens_of(lessons.features([0]), config).shape[2]
        make = partial(Reconstruction, channels, config)
        network = drawn_network(make, training.seed, lessons.images.device)
        self.losses = learn(
            network, lessons, training, "training the transformer", self.workplace, progress, self.config
        )
        self.reconstruction = network

    def from_features(self, features: FeatureMaps, region: RegionOfInterest | None = None) -> Prediction:
        config, tokens_BTD = self.config, tokens_of(features, self.config)
        found_BTD = self.reconstruction.transformer(tokens_BTD, inside_of(tokens_BTD, config, region))
        distance_BGG = grid_of((found_BTD - tokens_BTD).norm(dim=2), config)
        maps = pixel_maps(distance_BGG, self.side, config.sigma, region)
        return Prediction(highest(window_means(maps), region=region), maps)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the weights of the transformer, which can tell THE PRODUCT'S FEATURES."""
        return weights_of(self.reconstruction), {"channels": self.reconstruction.transformer.channels}

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.reconstruction = with_weights(partial(Reconstruction, facts["channels"], self.config), tensors)


def window_means(maps_BSS: Tensor) -> Tensor:
    """The mean over the window around every pixel, or over the nearest one that lies in the map: [B, S, S]."""
    side = max(1, round(WINDOW * maps_BSS.shape[2]))
    before, after = side // 2, side - 1 - side // 2
    means = F.avg_pool2d(maps_BSS[:, None], side, stride=1)
    return F.pad(means, (before, after, before, after), mode="replicate")[:, 0]
