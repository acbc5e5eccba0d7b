"""ReContrast: an encoder of the product's own learns together with a decoder that reconstructs it (Guo et al. 2023).

Frozen features and those of a trained copy of the backbone -> each reconstructs the other through RD4AD's bottleneck
and reversed decoder (`network`) -> cosine distances of the six levels, upsampled and added, are the map (`training`).

The released code of RD4AD and ReContrast upsamples with aligned corners; we do as the other detectors here, without.

Shapes: B images, S side in pixels, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from adpretrain.backbones import Backbone, Extract, FeatureMaps
from adpretrain.progress import Progress
from downstream.detector import Detector, NormalFeatures, Prediction
from downstream.detectors.recontrast.encoder import check_trainable, trainable_copy
from downstream.detectors.recontrast.network import Reversed, check_pyramid
from downstream.detectors.recontrast.training import FORMS, Contrast
from downstream.embedding import EmbeddingConfig, chosen_levels, settle_levels
from downstream.learning import drawing, learn
from downstream.lessons import LearningConfig, Normals
from downstream.maps import SIGMA, check_sigma, check_top, gaussian_blur, highest
from downstream.reconstruction import summed_maps
from downstream.roi import RegionOfInterest

STAGES = (1, 2, 3)  # the stages of a ResNet that the papers use
NORMS = ("train", "eval", "guarded")
ENCODER = "encoder."  # prefix of the names of the trained encoder's weights in the file


@dataclass(frozen=True)
class ReContrastConfig:
    """Options of `ReContrast` and of `RD4AD`. The defaults are those of the ReContrast paper on MVTec AD.

    Args:
        levels: levels of the extract, counted from 0, finest first; "paper" = stages 1 to 3 of a network with stages,
            null = all. Each must be twice as large as the next.
        form: configuration of the paper's Table 6. "A": regional loss, frozen encoder. "B": global loss (released
            RD4AD). "C": the encoder is trained, too. "D": no gradient through what is reconstructed. "C+cp": "C" with
            the contrast of a frozen and a trained encoder. "E": all of these; with hard mining the paper's ReContrast.
        hard_mining: whether the gradients of places that are easy to reconstruct are discarded (Eq. 5).
        alpha: of Eq. 5, after the first tenth of the steps, in which it rises from -3.
        bottleneck: the residual blocks have a 1/bottleneck of their channels inside: 2 for WideResNet-50, 4 for
            ResNet-50, 0 for blocks of two 3 x 3 convolutions as in ResNet-18; null = 2 or 0, by the channels.
        learning_rate: of the bottleneck and the decoder.
        encoder_rate: learning rate of the encoder.
        batch_norm: "train" lets the trained encoder's batch norms use the batch, "eval" the pretrained statistics, for
            products on which training is unstable; "guarded" replaces only vanishing variances (App. E, there together
            with training.reset_every=500).
        top: the image score is the mean of this share of the highest map values; 0 = the maximum, 1 = the mean of the
            map, for data whose anomalies are whole objects of another class.
        sigma: standard deviation of the Gaussian that smooths the maps, in pixels.
        training: steps, images per step and seed. The paper takes 3,000 steps on VisA and 1,000 on APTOS and OCT2017.
    """

    levels: list[int] | Literal["paper"] | None = "paper"
    form: Literal["A", "B", "C", "C+cp", "D", "E"] = "E"
    hard_mining: bool = True
    alpha: float = 1.0
    bottleneck: int | None = None
    learning_rate: float = 2e-3
    encoder_rate: float = 1e-5
    batch_norm: Literal["train", "eval", "guarded"] = "train"
    top: float = 0.0
    sigma: float = SIGMA
    training: LearningConfig = field(default_factory=lambda: LearningConfig(steps=2000))

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        check_top(self.top)
        if self.form not in FORMS:
            raise ValueError(f"form {self.form!r} is unknown; choose one of {', '.join(FORMS)}")
        if self.batch_norm not in NORMS:
            raise ValueError(f"batch_norm {self.batch_norm!r} is unknown; choose one of {', '.join(NORMS)}")
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha {self.alpha} must be a number of standard deviations, such as 1")
        if self.bottleneck is not None and self.bottleneck < 0:
            raise ValueError(f"bottleneck {self.bottleneck} must be 0, 2, 4 or another divisor, or null")
        for name in ("learning_rate", "encoder_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")


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
        device = images.images.device
        with drawing(torch.device("cpu"), config.training.seed):
            network = self._network([level.shape[1] for level in levels]).to(device)
        model = Contrast(network, self._encoder(), config)
        what = f"training {self.name}"
        self.losses = learn(model, images, config.training, what, self.workplace, progress)
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
        return {**self.model.network.state_dict(), **{f"{ENCODER}{name}": value for name, value in own.items()}}, {}

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        own = {name: value for name, value in tensors.items() if not name.startswith(ENCODER)}
        channels = [len(tensors[f"heads.0.{level}.weight"]) for level in range(self._levels(own))]
        with torch.device("meta"):  # nothing is allocated for what may not fit
            network = self._network(channels)
        network.load_state_dict(own, assign=True)
        encoder = self._encoder()
        if encoder is not None:
            copied = {name.removeprefix(ENCODER): value for name, value in tensors.items() if name.startswith(ENCODER)}
            encoder.load_state_dict(copied)
        self.model = Contrast(network, encoder, self.config).requires_grad_(False).eval()

    @staticmethod
    def _levels(tensors: Mapping[str, Tensor]) -> int:
        """How many levels the saved network reconstructs."""
        return sum(name.startswith("heads.0.") and name.endswith(".weight") for name in tensors)
