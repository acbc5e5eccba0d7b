"""GLASS: a discriminator of normal features and anomalies that are made from them (Chen et al. 2024).

Patch embeddings as in PatchCore -> linear adaptor -> two-layer discriminator, trained on normal images, on anomalies
made of their features by gradient ascent, and on pictures with pasted textures (`training`, `synthesis`). Maps are the
probabilities of an anomaly, upsampled and smoothed; the image score is the largest probability of a patch.

The paper pools stages 2 and 3 of a WideResNet-50 to 1,536 channels, which is what they have together.

Shapes: B images, S side in pixels, H x W patches of an image, D channels of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.progress import Progress
from downstream.detector import Detector, NormalFeatures, Prediction
from downstream.detectors.glass.config import GLASSConfig
from downstream.detectors.glass.synthesis import Textures
from downstream.detectors.glass.training import Discriminator, Training
from downstream.embedding import Embedding, settle_levels
from downstream.learning import learn
from downstream.lessons import Normals
from downstream.maps import highest_tokens, pixel_maps
from downstream.network_weights import drawn_network, weights_of, with_weights
from downstream.roi import RegionOfInterest

STAGES = (2, 3)
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
        self.losses = learn(
            training, lessons, config.training, "training the discriminator", self.workplace, progress, self.config
        )
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
