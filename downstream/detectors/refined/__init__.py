"""Any detector with a refinement network on its maps: ReConPatch suppl. D.

The detector is fitted on the normal images; then defects are made in them (`simulation`), the detector scores these
images, and the network (`refinement`) learns the masks from image and map. The map enters as modified z-scores
(Eq. 11), so that its unit does not matter [ours].

Shapes: n normal images, B images of a step, S side in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from adpretrain.backbones import Extract
from adpretrain.parsing import from_dict
from downstream.composite import Composite, LoadedComposite, save_composite
from downstream.coreset import Progress
from downstream.detector import Detector, Prediction, not_fitted
from downstream.detectors.building import build_detector
from downstream.detectors.ensemble import ScoreUnit, Units, training_units
from downstream.detectors.refined.refinement import DEFAULT as NETWORK
from downstream.detectors.refined.refinement import RefinementConfig, RefinementNetwork, build_network, refinement_loss
from downstream.detectors.refined.simulation import simulate


@dataclass(frozen=True)
class RefinedConfig:
    """A `Refined` by name.

    Args:
        detector: name of the detector whose maps are sharpened (the paper's is "reconpatch").
        options: its options, in place of its own.
        network: the refinement network and its training.
    """

    detector: str = "reconpatch"
    options: dict[str, Any] = field(default_factory=dict)
    network: RefinementConfig = field(default_factory=RefinementConfig)


DEFAULT = RefinedConfig()


class Refined(Composite):
    """A detector whose maps are the network's logits, and whose score is a map's maximum.

    Logits, not probabilities: of two certain defects one is still more certain, where probabilities are both 1.
    ``textures`` [T, 3, S, S], normalised like the images: what "textural" defects are made of; not saved.
    """

    saved_as = "refined"

    def __init__(self, detector: Detector, config: RefinementConfig = NETWORK, textures: Tensor | None = None) -> None:
        self.detector, self.config, self.textures = detector, config, textures
        self.members = [detector]
        self.losses: list[float] = []
        self._network: RefinementNetwork | None = None
        self._units: Units | None = None

    @classmethod
    def of(cls, extract: Extract, options: RefinedConfig) -> Self:
        """The detector that ``options`` name on ``extract``, unfitted, and a network for its maps."""
        return cls(build_detector(options.detector, extract, options.options), options.network)

    def fit(self, normal_batches: Iterable[Tensor], progress: Progress | None = None) -> Self:
        """Fit the detector, then the network, on batches [b, 3, S, S]; n images, all kept until both are fitted.

        The detector scores every image once per epoch: its time decides. ``progress(what, done, total)`` is told every
        step. ``losses`` are the means of the epochs.
        """
        batches = list(normal_batches)
        self.detector.fit(batches)
        self._units = training_units(self.detector, batches)
        device = self.detector.predict(batches[0][:1]).maps.device
        network = build_network(self.config).to(device)
        self.losses = self._train(network, [image for batch in batches for image in batch], progress)
        self._network = network.eval()
        return self

    def _train(self, network: RefinementNetwork, images: list[Tensor], progress: Progress | None) -> list[float]:
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
                maps = self._standard_maps(made.images)
                with torch.enable_grad():
                    logits = network(made.images.to(maps), maps)
                    loss = refinement_loss(logits, made.masks.to(maps.device), config)
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

    def _standard_maps(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> the detector's maps as modified z-scores: [B, S, S]."""
        assert self._units is not None
        with torch.no_grad():
            return self._units.pixels.standard(self.detector.predict(images).maps.float())

    @torch.no_grad()
    def predict(self, images: Tensor) -> Prediction:
        """[B, 3, S, S] -> scores [B], maps [B, S, S]. Raises ValueError before `fit`."""
        if self._network is None:
            raise not_fitted(self)
        maps = self._standard_maps(images)
        refined = self._network.to(maps.device)(images.to(maps), maps)
        return Prediction(refined.flatten(1).amax(1), refined)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the fitted detector, FEATURES OF THE PRODUCT among it (`downstream.saved`), and the network.

        Raises ValueError before `fit`, if ``folder`` holds other files, or if the detector cannot be saved.
        """
        if self._network is None or self._units is None:
            raise not_fitted(self)
        units = self._units
        rows = (units.scores.median, units.scores.mad, units.pixels.median, units.pixels.mad)
        tensors = {"units": torch.tensor(rows, dtype=torch.float64)}
        tensors |= {f"network.{name}": value for name, value in self._network.state_dict().items()}
        facts = {"losses": self.losses}
        return save_composite(folder, self.saved_as, self.config, self.members, tensors, units.side, facts)

    @classmethod
    def _restored(cls, loaded: LoadedComposite) -> Self:
        options = from_dict(RefinementConfig, loaded.config.options, f"options of {loaded.folder}")
        refined = cls(loaded.members[0], options)
        median, mad, pixel_median, pixel_mad = loaded.tensors.pop("units").tolist()
        refined._units = Units(ScoreUnit(median, mad), ScoreUnit(pixel_median, pixel_mad), loaded.config.image_size)
        refined.losses = loaded.config.facts["losses"]
        with torch.device("meta"):  # sizes of any config cost nothing before the file is seen to hold them
            network = build_network(options)
        network.load_state_dict(
            {name.removeprefix("network."): value for name, value in loaded.tensors.items()}, assign=True
        )
        refined._network = network.eval()
        return refined


def _batches(count: int, config: RefinementConfig, epoch: int) -> Iterator[list[int]]:
    order = np.random.default_rng([config.seed, epoch]).permutation(count).tolist()
    return (order[start : start + config.batch_size] for start in range(0, count, config.batch_size))
