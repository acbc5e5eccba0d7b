"""ReContrast: an encoder of the product's own learns together with a decoder that reconstructs it (Guo et al. 2023).

Frozen features and those of a trained copy of the backbone -> each reconstructs the other through RD4AD's bottleneck
and reversed decoder (`network`) -> cosine distances of the six levels, upsampled and added, are the map (`training`).

The released code of RD4AD and ReContrast upsamples with aligned corners; we do as the other detectors here, without.

Shapes: B images, S side in pixels, L levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from adpretrain.backbones import Backbone, Extract, FeatureMaps
from adpretrain.progress import Progress
from downstream.detector import Detector, NormalFeatures, Prediction
from downstream.detectors.recontrast.encoder import check_trainable, trainable_copy
from downstream.detectors.recontrast.forms import FORMS, ReContrastConfig
from downstream.detectors.recontrast.network import Reversed, check_pyramid
from downstream.detectors.recontrast.training import Contrast
from downstream.embedding import EmbeddingConfig, chosen_levels, settle_levels
from downstream.learning import learn
from downstream.lessons import Normals
from downstream.maps import gaussian_blur, highest
from downstream.network_weights import NETWORK, drawn_network, weights_of, with_weights
from downstream.reconstruction import summed_maps
from downstream.roi import RegionOfInterest

STAGES = (1, 2, 3)  # the stages of a ResNet that the papers use
ENCODER = "encoder."  # prefix of the names of the trained encoder's weights in the file

DEFAULT = ReContrastConfig()


class ReContrast(Detector):
    """Six (or three) levels and their reconstructions -> cosine distances, upsampled and added -> smoothed map -> its
    maximum.

    One product or several: fit it on the normal images of all of them for one model of all. Fitting keeps the images
    in memory. ``losses`` [steps] are those of the last `fit`.
    """

    name = "recontrast"
    options = ReContrastConfig
    learns = True

    model: Contrast

    def __init__(self, extract: Extract, config: ReContrastConfig = DEFAULT) -> None:
        levels = settle_levels(EmbeddingConfig(config.levels), extract, STAGES).levels
        super().__init__(extract, replace(config, levels=levels))
        if FORMS[config.form].trains:
            check_trainable(extract, config.form)
        self.losses: list[float] = []

    def fit_features(self, normals: NormalFeatures, progress: Progress | None) -> None:
        """Train the network, and the encoder if the form says so. Raises ValueError for levels that do not make a
        pyramid, or a loss that is not finite."""
        config = self.config
        images = Normals(normals)
        levels = chosen_levels(images.features([0]), config.levels)
        check_pyramid(levels)
        make = partial(self._network, [level.shape[1] for level in levels])
        network = drawn_network(make, config.training.seed, images.images.device)
        model = Contrast(network, self._encoder(), config)
        what = f"training {self.name}"
        self.losses = learn(model, images, config.training, what, self.workplace, progress, self.config)
        self.model = model.requires_grad_(False)

    def _network(self, channels: list[int]) -> Reversed:
        return Reversed(channels, 2 if FORMS[self.config.form].crosses else 1, self.config.bottleneck)

    def _encoder(self) -> Backbone | None:
        if not FORMS[self.config.form].trains:
            return None
        assert isinstance(self.extract, Backbone)
        return trainable_copy(self.extract, self.config.levels, self.config.batch_norm == "guarded")

    def seen(self, images: Tensor, features: FeatureMaps) -> FeatureMaps:
        """The levels of the frozen encoder, followed by those of the trained one."""
        encoder = self.model.encoder
        return features if encoder is None else [*features, *encoder(images)]

    def from_features(self, features: FeatureMaps, region: RegionOfInterest | None = None) -> Prediction:
        pairs = self.model.pairs(features, region)
        maps = gaussian_blur(summed_maps(pairs, self.side, region), self.config.sigma)
        return Prediction(highest(maps, self.config.top, region), maps)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the weights of the network and of the trained encoder, which KNOW THE PRODUCT'S FEATURES."""
        encoder = self.model.encoder
        own = {} if encoder is None else encoder.state_dict()
        return {**weights_of(self.model.network), **{f"{ENCODER}{name}": value for name, value in own.items()}}, {}

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        heads = f"{NETWORK}heads.0."  # one for each level that the saved network reconstructs
        levels = sum(name.startswith(heads) and name.endswith(".weight") for name in tensors)
        channels = [len(tensors[f"{heads}{level}.weight"]) for level in range(levels)]
        network = with_weights(partial(self._network, channels), tensors)
        encoder = self._encoder()
        if encoder is not None:
            copied = {name.removeprefix(ENCODER): value for name, value in tensors.items() if name.startswith(ENCODER)}
            encoder.load_state_dict(copied)
        self.model = Contrast(network, encoder, self.config).requires_grad_(False).eval()
