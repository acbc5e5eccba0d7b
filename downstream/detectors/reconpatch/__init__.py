"""ReConPatch: PatchCore on a representation that was trained on the product's normal patches (Hyun et al. 2024).

Patch embeddings as in PatchCore -> f, trained with pseudo-labels (`representation`, `similarity`) -> greedy coreset of
f's outputs -> nearest distance, weighted for *every* patch (Eq. 9, 10), where PatchCore weighs the farthest alone.
The image's score is the largest of the weighted patch scores; the map is upsampled and smoothed as in PatchCore.

`downstream.detectors.ensemble` joins several (Eq. 11); `downstream.detectors.refined` sharpens the maps (suppl. D).

Shapes: B images, S side in pixels, H x W patches of an image, D channels of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.memory import hold, memory_limit
from downstream.coreset import Progress
from downstream.detector import Detector, NormalFeatures, Prediction
from downstream.detectors.patchcore import PatchCore, PatchCoreConfig
from downstream.detectors.reconpatch.representation import (
    NormalPatches,
    Representation,
    RepresentationConfig,
    train_representation,
)
from downstream.embedding import EmbeddingConfig

REPRESENTATION = "representation."  # before the names of its weights
MATRICES = 12  # of similarities between a step's patches that live at once, backward pass included (measured: 11.3)


def _memory() -> PatchCoreConfig:
    return PatchCoreConfig(amount=0.01, reweight_all=True)


@dataclass(frozen=True)
class ReConPatchConfig:
    """Options of `ReConPatch`.

    Args:
        memory: embedding, coreset, neighbours and smoothing, as for `PatchCore`. The paper: stages 2 and 3 of a
            WideResNet, 3 x 3 patches, 1 % of the patches. b of Eq. 10 is not given.
        training: how the representation is trained.
        cache_bytes: embeddings of the normal images are kept up to this size, on the features' device; beyond it they
            are computed anew in every epoch, and a fit takes ``epochs`` + 2 passes over the images.
    """

    memory: PatchCoreConfig = field(default_factory=_memory)
    training: RepresentationConfig = field(default_factory=RepresentationConfig)
    cache_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        if self.cache_bytes < 0:
            raise ValueError(f"cache_bytes {self.cache_bytes} must be at least 0, which keeps nothing")


DEFAULT = ReConPatchConfig()
# A member of the paper's ensemble (WideResNet-101, ResNeXt-101, DenseNet-201) at 320 pixels, and at 480.
ENSEMBLE_320 = ReConPatchConfig(
    training=RepresentationConfig(dim=384, projection_dim=384, epochs=60, learning_rate=1e-6)
)
ENSEMBLE_480 = ReConPatchConfig(
    replace(_memory(), embedding=EmbeddingConfig(patch=5)), RepresentationConfig(learning_rate=1e-6)
)


class ReConPatch(Detector):
    """A representation of the product's patches, and a memory bank of its normal ones.

    ``losses`` [epochs] of the last `fit`. Memory while it is fitted: the embeddings, up to ``cache_bytes``; some 12
    matrices of patches_per_step x patches_per_step floats; then f's outputs of all patches, as `PatchCore`'s bank.
    """

    name = "reconpatch"
    options = ReConPatchConfig

    representation: Representation

    def __init__(self, extract: Extract, config: ReConPatchConfig = DEFAULT) -> None:
        self._core = PatchCore(extract, config.memory)
        super().__init__(extract, replace(config, memory=self._core.config))
        self.losses: list[float] = []

    def fit_features(self, normals: NormalFeatures, progress: Progress | None) -> None:
        """Train on the embeddings, and remember what becomes of them.

        The batches are read once if their embeddings fit in ``cache_bytes``, else once per epoch and twice more, which
        an iterator does not allow: ValueError. Also for too few patches or a loss that is not finite.
        """

        def embeddings() -> Iterator[Tensor]:
            return (self._embed(features) for features in normals)

        patches = NormalPatches(embeddings, self.config.cache_bytes, normals.repeatable, progress)
        similarities = MATRICES * 4 * self.config.training.patches_per_step**2
        held = sum(maps.nbytes for maps in patches.kept or ()) + similarities
        what = f"training on the patches of {patches.images} images"
        hold(what, held, memory_limit(patches.device), "lower training.patches_per_step or cache_bytes")
        representation = Representation(patches.width, self.config.training).to(patches.device)
        self.losses = train_representation(representation, patches, self.config.training, progress)
        with torch.no_grad():
            represented = (representation(maps_BHWD) for maps_BHWD in patches.maps())
            self._core.remember(self._core.choose(represented, None, progress))
        self.representation = representation

    def _embed(self, features: FeatureMaps) -> Tensor:
        return self._core.embedding(features).float()

    def from_features(self, features: FeatureMaps) -> Prediction:
        return self._core.score(self.representation(self._embed(features)), self.side)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The bank, FEATURES OF THE PRODUCT, and the representation."""
        tensors, _ = self._core.state()
        tensors |= {f"{REPRESENTATION}{name}": value for name, value in self.representation.state_dict().items()}
        return tensors, {"losses": self.losses}

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        named = {name.removeprefix(REPRESENTATION): name for name in tensors if name.startswith(REPRESENTATION)}
        state = {short: tensors[name] for short, name in named.items()}
        training = self.config.training
        found = [len(state.get(name, ())) for name in ("f.weight", "g.weight")]
        if found != [training.dim, training.projection_dim or 0]:  # said before memory is taken for them
            raise ValueError(f"options of {training.dim} and {training.projection_dim} channels, weights of {found}")
        self.representation = Representation(state["f.weight"].shape[1], training)
        self.representation.to(state["f.weight"].device).load_state_dict(state)
        self.losses = facts["losses"]
        self._core.restore(tensors, {})
