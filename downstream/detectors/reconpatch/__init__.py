"""ReConPatch: PatchCore on a representation that was trained on the product's normal patches (Hyun et al. 2024).

Patch embeddings as in PatchCore -> f, trained with pseudo-labels (`representation`, `similarity`) -> greedy coreset of
f's outputs -> nearest distance, weighted for *every* patch (Eq. 9, 10), where PatchCore weighs the farthest alone.
The image's score is the largest of the weighted patch scores; the map is upsampled and smoothed as in PatchCore.

`downstream.detectors.ensemble` joins several (Eq. 11); `downstream.detectors.refined` sharpens the maps (suppl. D).

Shapes: B images, S side in pixels, H x W patches of an image, D channels of an embedding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from adpretrain.backbones import Extract
from adpretrain.memory import hold, memory_limit
from downstream.coreset import Progress
from downstream.detector import (
    Prediction,
    check_images,
    check_side,
    extracted,
    keeping_references,
    normal_features,
    not_fitted,
)
from downstream.detectors.patchcore import PatchCore, PatchCoreConfig
from downstream.detectors.reconpatch.representation import (
    NormalPatches,
    Representation,
    RepresentationConfig,
    train_representation,
)
from downstream.embedding import EmbeddingConfig
from downstream.pretrained import Pretrained
from downstream.saved import Loaded, save_detector

NAME = "reconpatch"
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


class ReConPatch(Pretrained):
    """A representation of the product's patches, and a memory bank of its normal ones.

    ``losses`` [epochs] of the last `fit`. Memory while it is fitted: the embeddings, up to ``cache_bytes``; some 12
    matrices of patches_per_step x patches_per_step floats; then f's outputs of all patches, as `PatchCore`'s bank.
    """

    saved_as = (NAME, ReConPatchConfig)

    def __init__(self, extract: Extract, config: ReConPatchConfig = DEFAULT) -> None:
        self.extract = self._given = extract
        self._core = PatchCore(extract, config.memory)
        self.config = replace(config, memory=self._core.config)
        self.representation: Representation | None = None
        self.losses: list[float] = []

    def fit(self, normal_batches: Iterable[Tensor], progress: Progress | None = None) -> Self:
        """Train on batches [b, 3, S, S] of normal images, and remember them. ``progress(what, done, total)`` is told.

        The batches are read once if their embeddings fit in ``cache_bytes``, else once per epoch and twice more, which
        an iterator does not allow: ValueError. Also for bad images, too few patches or a loss that is not finite.
        """
        self.extract = keeping_references(self._given)
        side = 0

        def embeddings() -> Iterator[Tensor]:
            nonlocal side
            for images, features in normal_features(self.extract, normal_batches):
                side = int(images.shape[2])
                yield self._core.embedding(features).float()

        repeatable = iter(normal_batches) is not normal_batches
        patches = NormalPatches(embeddings, self.config.cache_bytes, repeatable, progress)
        similarities = MATRICES * 4 * self.config.training.patches_per_step**2
        held = sum(maps.nbytes for maps in patches.kept or ()) + similarities
        what = f"training on the patches of {patches.images} images"
        hold(what, held, memory_limit(patches.device), "lower training.patches_per_step or cache_bytes")
        representation = Representation(patches.width, self.config.training).to(patches.device)
        self.losses = train_representation(representation, patches, self.config.training, progress)
        with torch.no_grad():
            represented = (representation(maps_BHWD) for maps_BHWD in patches.maps())
            self._core.remember(self._core.choose(represented, None, progress), side)
        self.representation = representation
        return self

    @torch.no_grad()
    def predict(self, images: Tensor) -> Prediction:
        """[B, 3, S, S] -> scores [B], maps [B, S, S]. Raises ValueError before `fit`, or for images of another size."""
        if self.representation is None:
            raise not_fitted(self)
        check_images(images)
        check_side(images, self._core.side)
        embeddings_BHWD = self._core.embedding(extracted(self.extract, images)).float()
        return self._core.score(self.representation(embeddings_BHWD))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the fitted detector: its bank holds FEATURES OF THE PRODUCT (`downstream.saved`).

        Raises ValueError before `fit`, or if ``folder`` holds other files.
        """
        if self.representation is None or self._core.bank_ND is None:
            raise not_fitted(self)
        tensors = {"bank": self._core.bank_ND, **self._core.embedding.state_dict()}
        tensors |= {f"representation.{name}": value for name, value in self.representation.state_dict().items()}
        facts = {"losses": self.losses}
        return save_detector(folder, NAME, self.config, self.extract, tensors, self._core.side, facts)

    @classmethod
    def _restored(cls, loaded: Loaded[Any]) -> Self:
        detector = cls(loaded.extract, loaded.options)
        prefix = "representation."
        state = {name[len(prefix) :]: value for name, value in loaded.tensors.items() if name.startswith(prefix)}
        training = loaded.options.training
        found = [len(state.get(name, ())) for name in ("f.weight", "g.weight")]
        if found != [training.dim, training.projection_dim or 0]:  # said before memory is taken for them
            raise ValueError(f"options of {training.dim} and {training.projection_dim} channels, weights of {found}")
        detector.representation = Representation(state["f.weight"].shape[1], training)
        detector.representation.to(state["f.weight"].device).load_state_dict(state)
        detector.losses = loaded.facts["losses"]
        detector._core.embedding.reducer = loaded.tensors.get("reducer")
        detector._core.remember(loaded.tensors["bank"], loaded.image_size)
        return detector
