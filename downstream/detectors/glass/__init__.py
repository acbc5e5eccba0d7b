"""GLASS: a discriminator of normal features and anomalies that are made from them (Chen et al. 2024).

Patch embeddings as in PatchCore -> linear adaptor -> two-layer discriminator, trained on normal images, on anomalies
made of their features by gradient ascent, and on pictures with pasted textures (`training`, `synthesis`). Maps are the
probabilities of an anomaly, upsampled and smoothed; the image score is the largest probability of a patch.

The paper pools stages 2 and 3 of a WideResNet-50 to 1,536 channels, which is what they have together.

Shapes: B images, S side in pixels, H x W patches of an image, D channels of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.progress import Progress
from downstream.detector import Detector, NormalFeatures, Prediction
from downstream.detectors.glass.synthesis import Textures
from downstream.detectors.glass.training import Discriminator, Training
from downstream.embedding import Embedding, EmbeddingConfig, settle_levels
from downstream.learning import learn
from downstream.lessons import LearningConfig, Normals
from downstream.maps import SIGMA, check_sigma, highest_tokens, pixel_maps
from downstream.network_weights import drawn_network, weights_of, with_weights
from downstream.roi import RegionOfInterest

FORMS = ("hypersphere", "manifold")
STAGES = (2, 3)


@dataclass(frozen=True)
class GLASSConfig:
    """Options of `GLASS`.

    Args:
        embedding: levels and channels of a patch; the neighbourhood is 3 x 3 patches.
        form: what global anomalies are kept away from: "hypersphere" (the centre of the normal features, GLASS-h, which
            ADPretrain uses; its distances need no unit) or "manifold" (every normal feature, GLASS-m).
        radii: least and largest distance of global anomalies; for "hypersphere" in units of that of normal features,
            for "manifold" in the unit of the features, where the authors' code has 0.5 and 1.
        noise: standard deviation of the noise on a feature, before the ascent.
        climb_steps, climb_rate: number and length of the steps of the gradient ascent.
        easy: share of the patches with pasted textures that are judged best and left out of the loss.
        hidden: channels inside the discriminator.
        learning_rate, adaptor_rate: learning rates of discriminator and adaptor.
        textures: folder with photographs of textures to paste, on the machine that fits; null = coloured noise.
        sigma: standard deviation of the Gaussian that smooths the maps, in pixels.
        training: steps and images per step; the number of steps is [ours], the authors take some 31,000.
    """

    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    form: Literal["hypersphere", "manifold"] = "hypersphere"
    radii: tuple[float, float] = (1.0, 2.0)
    noise: float = 0.015
    climb_steps: int = 20
    climb_rate: float = 1e-3
    easy: float = 0.5
    hidden: int = 1024
    learning_rate: float = 2e-4
    adaptor_rate: float = 1e-4
    textures: str | None = None
    sigma: float = SIGMA
    training: LearningConfig = field(default_factory=lambda: LearningConfig(steps=2000, batch_size=8))

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        object.__setattr__(self, "radii", tuple(self.radii))  # JSON and YAML give lists
        if self.form not in FORMS:
            raise ValueError(f"form {self.form!r} is unknown; choose one of {', '.join(FORMS)}")
        if len(self.radii) != 2 or not 0 < self.radii[0] <= self.radii[1] < math.inf:
            raise ValueError(f"radii {self.radii} must be two positive distances, ascending, such as (1, 2)")
        for name in ("learning_rate", "adaptor_rate", "climb_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")
        if not 0 <= self.noise < math.inf or self.climb_steps < 0:
            raise ValueError(f"noise {self.noise} and climb_steps {self.climb_steps} must not be negative")
        if not 0 <= self.easy < 1:
            raise ValueError(f"easy {self.easy} must be a share, 0 (learn from all patches) to below 1")
        if not 1 <= self.hidden <= 65536:
            raise ValueError(f"hidden {self.hidden} must be at least 1, and at most 65536")


DEFAULT = GLASSConfig()


class GLASS(Detector):
    """Embeddings -> probability of an anomaly of every patch -> upsampled, smoothed map, and the largest.

    ``losses`` [steps] are those of the last `fit`.
    """

    name = "glass"
    options = GLASSConfig
    learns = True

    network: Discriminator

    def __init__(self, extract: Extract, config: GLASSConfig = DEFAULT) -> None:
        settled = settle_levels(config.embedding, extract, STAGES)
        super().__init__(extract, replace(config, embedding=settled))
        self.embedding = Embedding(settled)
        self.losses: list[float] = []

    def fit_features(self, normals: NormalFeatures, progress: Progress | None) -> None:
        """Train the discriminator. The extract sees the images of every step anew, with textures pasted in."""
        config, lessons = self.config, Normals(normals)
        textures = Textures.of(config.textures, getattr(self.extract, "preprocess", None))
        width = self.embedding(lessons.features([0])).shape[3]
        make = partial(Discriminator, width, config.hidden)
        network = drawn_network(make, config.training.seed, lessons.images.device)
        training = Training(network, self.embedding, config, textures, lessons)
        self.losses = learn(training, lessons, config.training, "training the discriminator", self.workplace, progress)
        self.network = network

    def from_features(self, features: FeatureMaps, region: RegionOfInterest | None = None) -> Prediction:
        embeddings_BHWD = self.embedding(features).float()
        height, width = embeddings_BHWD.shape[1:3]
        probability_BHW = self.network(embeddings_BHWD.flatten(0, 2)).sigmoid().view(-1, height, width)
        maps = pixel_maps(probability_BHW, self.side, self.config.sigma, region)
        return Prediction(highest_tokens(probability_BHW, 0.0, region), maps)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return adaptor and discriminator, which describe THE PRODUCT'S FEATURES."""
        return {**weights_of(self.network), **self.embedding.state_dict()}, {"width": self.network.width}

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.embedding.reducer = tensors.get("reducer")
        self.network = with_weights(partial(Discriminator, facts["width"], self.config.hidden), tensors)
