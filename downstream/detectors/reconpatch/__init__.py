"""ReConPatch: PatchCore on a representation that is trained on the product's normal patches (Hyun et al. 2024).

Patch embeddings as in PatchCore -> f, trained with pseudo-labels (`representation`, `similarity`) -> greedy coreset of
f's outputs -> nearest distance, weighted for *every* patch (Eq. 9, 10), where PatchCore weights only the farthest.
The image's score is the largest weighted patch score; the map is upsampled and smoothed as in PatchCore.

`downstream.detectors.ensemble` averages several (Eq. 11); `downstream.detectors.refined` sharpens the maps (suppl. D).

Shapes: B images, S side in pixels, H x W patches of an image, D channels of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.memory import hold, memory_limit
from adpretrain.progress import Progress
from downstream.detector import Detector, NormalFeatures, Prediction
from downstream.detectors.patchcore import PatchCore, PatchCoreConfig
from downstream.detectors.reconpatch.representation import (
    NormalPatches,
    Representation,
    RepresentationConfig,
    train_representation,
)
from downstream.embedding import EmbeddingConfig
from downstream.roi import RegionOfInterest

REPRESENTATION = "representation."  # prefix of the names of the representation's weights in the file
MATRICES = 12  # similarity matrices of a step in memory at once, including the backward pass (measured: 11.3)


def _memory() -> PatchCoreConfig:
    return PatchCoreConfig(amount=0.01, reweight_all=True)


@dataclass(frozen=True)
class ReConPatchConfig:
    """Options of `ReConPatch`.

    Args:
        memory: embedding, coreset, neighbours and smoothing, as for `PatchCore`. The paper uses stages 2 and 3 of a
            WideResNet, 3 x 3 patches and 1 % of the patches; it does not give b of Eq. 10.
        training: options for training the representation.
        cache_bytes: embeddings of the normal images are kept on the features' device if they are not larger than this;
            otherwise they are computed in every epoch, and fitting takes ``epochs`` + 2 passes over the images.
    """

    memory: PatchCoreConfig = field(default_factory=_memory)
    training: RepresentationConfig = field(default_factory=RepresentationConfig)
    cache_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        if self.cache_bytes < 0:
            raise ValueError(f"cache_bytes {self.cache_bytes} must be at least 0 (0 = keep nothing)")


DEFAULT = ReConPatchConfig()
# Options of a member of the paper's ensemble (WideResNet-101, ResNeXt-101, DenseNet-201) at 320 and at 480 pixels.
ENSEMBLE_320 = ReConPatchConfig(
    training=RepresentationConfig(dim=384, projection_dim=384, epochs=60, learning_rate=1e-6)
)
ENSEMBLE_480 = ReConPatchConfig(
    replace(_memory(), embedding=EmbeddingConfig(patch=5)), RepresentationConfig(learning_rate=1e-6)
)


class ReConPatch(Detector):
    """PatchCore with a trained representation of the product's patches.

    ``losses`` [epochs] are those of the last `fit`. Fitting needs memory for the embeddings, up to ``cache_bytes``, and
    some 12 matrices of patches_per_step x patches_per_step floats; then for f's outputs of all patches, like PatchCore.
    """

    name = "reconpatch"
    options = ReConPatchConfig

    representation: Representation

    def __init__(self, extract: Extract, config: ReConPatchConfig = DEFAULT) -> None:
        self._core = PatchCore(extract, config.memory)
        super().__init__(extract, replace(config, memory=self._core.config))
        self.losses: list[float] = []

    def fit_features(self, normals: NormalFeatures, progress: Progress | None) -> None:
        """Train the representation on the embeddings, then fill the memory bank with its outputs.

        The batches are read once if their embeddings fit in ``cache_bytes``, else ``epochs`` + 2 times. Raises
        ValueError if they must be read again but are an iterator, for too few patches, or if the loss is not finite.
        """

        def embeddings() -> Iterator[Tensor]:
            return (self._embed(features) for features in normals)

        region = normals.region
        patches = NormalPatches(embeddings, self.config.cache_bytes, normals.repeatable, progress, region)
        similarities = MATRICES * 4 * self.config.training.patches_per_step**2
        held = sum(maps.nbytes for maps in patches.kept or ()) + similarities
        what = f"training on the patches of {patches.images} images"
        hold(what, held, memory_limit(patches.device), "lower training.patches_per_step or cache_bytes")
        representation = Representation(patches.width, self.config.training).to(patches.device)
        self.losses = train_representation(representation, patches, self.config.training, progress)
        with torch.no_grad():
            represented = (representation(maps_BHWD) for maps_BHWD in patches.maps())
            self._core.remember(self._core.choose(represented, None, progress, region))
        self.representation = representation

    def _embed(self, features: FeatureMaps) -> Tensor:
        return self._core.embedding(features).float()

    def from_features(self, features: FeatureMaps, region: RegionOfInterest | None = None) -> Prediction:
        return self._core.score(self.representation(self._embed(features)), self.side, region)

    def traceable(self) -> Self:
        copied = super().traceable()
        copied._core = self._core.traceable()
        return copied

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the bank, which holds FEATURES OF THE PRODUCT, and the representation."""
        tensors, _ = self._core.state()
        tensors |= {f"{REPRESENTATION}{name}": value for name, value in self.representation.state_dict().items()}
        return tensors, {"losses": self.losses}

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        named = {name.removeprefix(REPRESENTATION): name for name in tensors if name.startswith(REPRESENTATION)}
        state = {short: tensors[name] for short, name in named.items()}
        training = self.config.training
        found = [len(state.get(name, ())) for name in ("f.weight", "g.weight")]
        if found != [training.dim, training.projection_dim or 0]:  # checked before memory is allocated for them
            raise ValueError(f"weights have {found} channels, options {training.dim} and {training.projection_dim}")
        self.representation = Representation(state["f.weight"].shape[1], training)
        self.representation.to(state["f.weight"].device).load_state_dict(state)
        self.losses = facts["losses"]
        self._core.restore(tensors, {})
