"""A detector whose maps are sharpened by a small network (ReConPatch suppl. D).

The detector is fitted on the normal images. Then defects are simulated in them (`simulation`), the detector scores
these images, and the network learns to predict from image and map which pixels belong to a defect. The map enters as
modified z-scores (Eq. 11), so that its unit does not matter [ours].

The supplement names two residual blocks, parallel atrous convolutions with different rates (ASPP), focal and L1 loss
and the optimiser. It does not give widths, rates, the input of the network, its resolution, or the weights of the
losses; these are [ours]. We use group instead of batch normalisation, so that a map does not depend on its batch.

Shapes: n normal images, B images of a step, S side in pixels, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from adpretrain.backbones import Extract
from adpretrain.progress import Progress
from downstream.detector import Detector, Prediction
from downstream.detectors import build_detector, detector_from_pretrained
from downstream.detectors.ensemble import Units, training_units
from downstream.detectors.refined.simulation import SimulationConfig, simulate
from downstream.maps import highest
from downstream.network_weights import weights_of, with_weights
from downstream.roi import RegionOfInterest
from downstream.saved import Loaded

GROUPS = 8


@dataclass(frozen=True)
class RefinementConfig:
    """The network and its training; values that the paper does not give are marked [ours].

    Args:
        width: C, the channels of all layers [ours], a multiple of 8.
        rates: dilations of the parallel convolutions; 1 = a 1 x 1 convolution [ours: those of DeepLab].
        stride: stride of the first block: 2 halves the resolution and takes a quarter of the time [ours].
        focusing: gamma of the focal loss; 0 = plain cross-entropy [ours: Lin et al. 2017].
        l1: weight of the L1 loss relative to the focal loss [ours].
        epochs: number of passes over the normal images, each with different defects.
        batch_size: images per step.
        learning_rate, momentum, weight_decay: options of SGD.
        seed: random seed of the initial weights, the order of the images and the defects.
        simulation: options of the simulated defects.
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


@dataclass(frozen=True)
class RefinedConfig:
    """Options of a `Refined` that is built by name.

    Args:
        detector: name of the detector whose maps are sharpened ("reconpatch" in the paper).
        options: options that override the detector's defaults.
        network: the refinement network and its training.
    """

    detector: str = "reconpatch"
    options: dict[str, Any] = field(default_factory=dict)
    network: RefinementConfig = field(default_factory=RefinementConfig)


DEFAULT, TRAINING = RefinedConfig(), RefinementConfig()


class Refined(Detector):
    """A detector whose maps are the network's logits, and whose score is the maximum of the map.

    We use logits because they still rank defects whose probabilities are both rounded to 1. ``textures`` [T, 3, S, S],
    normalised like the images, are the content of "textural" defects; they are not saved.
    """

    name = "refined"
    options = RefinementConfig
    load_member = staticmethod(detector_from_pretrained)

    _network: RefinementNetwork
    _units: Units

    def __init__(self, detector: Detector, config: RefinementConfig = TRAINING, textures: Tensor | None = None) -> None:
        self.detector, self.config, self.textures = detector, config, textures
        self.members = [detector]
        self.losses: list[float] = []

    @classmethod
    def of(cls, extract: Extract, config: RefinedConfig) -> Self:
        """Make an unfitted `Refined` around the detector that ``config`` names, on ``extract``."""
        return cls(build_detector(config.detector, extract, config.options), config.network)

    def fit(
        self, normal_batches: Iterable[Tensor], progress: Progress | None = None, roi: Tensor | None = None
    ) -> Self:
        """Fit the detector, then the network, on batches [b, 3, S, S]; all n images are kept until both are fitted.

        The detector scores every image once per epoch, which takes most of the time. ``progress(what, done, total)`` is
        called after every step. ``losses`` holds the mean loss of each epoch. ``roi``: as in `Detector.fit`; the
        network sees, and learns from, what is inside.
        """
        batches, region = list(normal_batches), self.keep_roi(roi)
        self.detector.fit(batches, progress, roi)
        self._units = training_units(self.detector, batches, roi)
        images = [image for batch in batches for image in batch]
        first = self.detector.predict(images[0][None], region and region.pick([0]).roi)
        network = build_network(self.config).to(first.maps.device)
        self.losses = self._train(network, images, progress, region)
        self._network, self.side = network.eval(), self._units.side
        return self

    def _train(
        self,
        network: RefinementNetwork,
        images: list[Tensor],
        progress: Progress | None,
        region: RegionOfInterest | None,
    ) -> list[float]:
        config = self.config
        optimizer = torch.optim.SGD(
            network.parameters(), config.learning_rate, config.momentum, weight_decay=config.weight_decay
        )
        steps, losses = -(-len(images) // config.batch_size), []
        for epoch in range(config.epochs):
            total = 0.0
            for step, indices in enumerate(_batches(len(images), config, epoch)):
                keys = [(config.seed, epoch, index) for index in indices]
                made = simulate(
                    torch.stack([images[index] for index in indices]), keys, config.simulation, self.textures
                )
                part = region and region.pick(indices)
                with torch.no_grad():
                    prediction = self.detector.predict(made.images, part and part.roi)
                    seen, maps = self._seen(made.images, prediction, part)
                with torch.enable_grad():
                    logits, masks = network(seen, maps), made.masks.to(maps.device)
                    if part is not None:
                        logits, masks = (torch.cat([v.flatten() for v in part.values(x)]) for x in (logits, masks))
                    loss = refinement_loss(logits, masks, config)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                total += float(loss.detach())
                if progress is not None:
                    progress("training the refinement", epoch * steps + step + 1, config.epochs * steps)
            losses.append(total / steps)
            if not np.isfinite(losses[-1]):
                raise ValueError(f"the loss of epoch {epoch + 1} is {losses[-1]}: lower learning_rate")
        return losses

    def _seen(self, images: Tensor, prediction: Prediction, region: RegionOfInterest | None) -> tuple[Tensor, Tensor]:
        """Return images [B, 3, S, S] and the detector's maps as modified z-scores [B, S, S], as the network gets them:
        both are 0 outside the region, so that nothing there changes what it says of the inside."""
        maps = self._units.pixels.standard(prediction.maps.float())
        images = images.to(maps)
        if region is None:
            return images, maps
        return torch.stack([region.only(channel, 0) for channel in images.unbind(1)], 1), region.only(maps, 0)

    @torch.no_grad()
    def predict(self, images: Tensor, roi: Tensor | None = None) -> Prediction:
        """[B, 3, S, S] -> scores [B], maps [B, S, S]. ``roi`` and errors as in `Detector.predict`."""
        self.check_fitted()
        region = self._region(images, roi)
        return self.from_members(images, [self.detector.predict(images, region and region.roi)], region)

    def from_members(
        self, images: Tensor, predictions: Sequence[Prediction], region: RegionOfInterest | None = None
    ) -> Prediction:
        seen, maps = self._seen(images, predictions[0], region)
        refined = self._network.to(maps.device)(seen, maps)
        scores = highest(refined, region=region)
        return Prediction(scores, refined if region is None else region.only(refined))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the units of the detector and the weights of the network."""
        units = torch.tensor(self._units.numbers, dtype=torch.float64)
        return {"units": units, **weights_of(self._network)}, {"losses": self.losses}

    @classmethod
    def _unfitted(cls, loaded: Loaded) -> Self:
        return cls(loaded.members[0], loaded.options)

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        self._units = Units.of_numbers(tensors.pop("units").tolist(), self.side)
        self.losses = facts["losses"]
        self._network = with_weights(lambda: build_network(self.config), tensors)


def _batches(count: int, config: RefinementConfig, epoch: int) -> Iterator[list[int]]:
    order = np.random.default_rng([config.seed, epoch]).permutation(count).tolist()
    return (order[start : start + config.batch_size] for start in range(0, count, config.batch_size))


def _convolution(inner: int, outer: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    layer = nn.Conv2d(inner, outer, kernel, stride, padding, dilation, bias=False)
    return nn.Sequential(layer, nn.GroupNorm(GROUPS, outer))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: [B, inner, h, w] -> [B, outer, ceil(h / stride), ceil(w / stride)]."""

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

    def __init__(self, config: RefinementConfig = TRAINING) -> None:
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
    """Initialise a network with the seed of ``config``; torch's global generator is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return RefinementNetwork(config)


def focal_loss(logits: Tensor, masks: Tensor, focusing: float = 2.0) -> Tensor:
    """Mean over pixels of -(1 - p)^gamma log p, with p the probability of the true class (Lin et al. 2017, Eq. 4).

    Logits and bool masks have the same shape. Computing from logits avoids overflow and vanishing gradients.
    """
    towards_truth = torch.where(masks, logits, -logits)
    log_p = F.logsigmoid(towards_truth)
    return (-torch.sigmoid(-towards_truth).pow(focusing) * log_p).mean()


def refinement_loss(logits: Tensor, masks: Tensor, config: RefinementConfig = TRAINING) -> Tensor:
    """Return focal loss + l1 x mean absolute difference of probability and mask: a scalar."""
    difference = (torch.sigmoid(logits) - masks.to(logits.dtype)).abs().mean()
    return focal_loss(logits, masks, config.focusing) + config.l1 * difference
