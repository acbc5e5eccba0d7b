"""The base class of detectors: it checks images and extracts their features; a subclass fits and scores these.

Shapes: b images of a batch, B images, S side of the network's input in pixels, L levels.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self, Unpack

from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.extractor import ADExtractor
from adpretrain.progress import Progress
from downstream.extracts import checked_features, fixed_picture, keeping_references
from downstream.normal_features import NormalFeatures, check_images
from downstream.roi import RegionOfInterest, bank_within
from downstream.saved import (
    ROI,
    ROI_EACH,
    HubOptions,
    Loaded,
    load_detector,
    publish_saved,
    put_together,
    save_detector,
    with_roi,
)

if TYPE_CHECKING:
    from adpretrain.hub.upload import Published
    from downstream.learning import Workplace


@dataclass(frozen=True)
class Prediction:
    """``scores`` [B] and ``maps`` [B, S, S]; higher is more anomalous, in a unit that depends on the detector.

    S is the side of the images, except for maps of FeatureNorm, whose side is its option ``image_size``. Maps are NaN
    outside the region of interest, if there is one, and scores are those of what is inside.
    """

    scores: Tensor
    maps: Tensor


class Detector:
    """Fits on normal images only, then scores and localises; with any `Extract`, a raw backbone or an `ADExtractor`.

    A subclass defines ``name``, the dataclass of its ``options``, how it uses features (`fit_features`,
    `from_features`), and how its fitted state is saved (`state`, `restore`). One made of others has ``members``.

    A fitted detector keeps the references that an `ADExtractor` had at that time: a later `set_references`, or fitting
    another detector, does not change it. Modules must be in evaluation mode. ``side`` is S of the images it was fitted
    on, 0 before. A saved detector is loaded without training data and gives the same bits (`downstream.saved`).

    ``roi`` is the region of interest (`downstream.roi`) of all images, bool [S, S], that it was fitted with and keeps;
    None if there was none, or (``roi_each``) one for every image.
    """

    name: ClassVar[str]
    options: ClassVar[type | None]
    # References are given to the extractor before `fit`, are the images that `fit` takes, or are chosen among these.
    references_are: ClassVar[Literal["given", "fitted", "chosen"]] = "given"
    load_member: ClassVar[Callable[..., Any] | None] = None  # loads any detector, if this one is made of others
    learns: ClassVar[bool] = False  # whether fitting trains a network, at the `workplace` (`downstream.learning`)

    extract: Extract
    members: Sequence[Detector] = ()
    side = 0
    roi: Tensor | None = None
    roi_each = False
    workplace: Workplace | None = None  # None = this process alone

    def __init__(self, extract: Extract, config: Any) -> None:
        self.extract = self._given = extract
        self.config = config

    @classmethod
    def of(cls, extract: Extract, config: Any) -> Self:
        """Make an unfitted detector on ``extract`` from the dataclass of options that `downstream.detectors` names."""
        return cls(extract, config)

    @property
    def fitted(self) -> bool:
        """Whether the detector can score images."""
        return self.side > 0

    def fit(
        self, normal_batches: Iterable[Tensor], progress: Progress | None = None, roi: Tensor | None = None
    ) -> Self:
        """Fit on batches [b, 3, S, S] of normal images: tensors, not a data loader's pairs or dictionaries.

        They are read once, one batch at a time, unless the detector says otherwise. ``progress(what, done, total)`` is
        called during long steps. ``roi``: the region of interest, bool [S, S] of all images or [N, S, S] of each in
        order, True where an image is inspected; what is outside is not learnt and never matched. A region of all images
        holds for the references that an `ADExtractor` was given, and for `predict`, too. Raises ValueError if there are
        no images, if they are malformed or differ in size, if the region does not fit them or covers no token, or
        before the memory would be exceeded.
        """
        self.extract = keeping_references(self._given)
        normals = NormalFeatures(self._features, normal_batches, self.keep_roi(roi))
        if self.roi is not None and isinstance(self.extract, ADExtractor) and self.extract.references is not None:
            self.extract.set_references(bank_within(self.extract.references, normals.region))
        self.fit_features(normals, progress)
        self.side = normals.side
        return self

    @torch.no_grad()
    def predict(self, images: Tensor, roi: Tensor | None = None) -> Prediction:
        """[B, 3, S, S] -> scores [B], maps [B, S, S]. ValueError before `fit`, for malformed images or another S.

        ``roi``: the region of interest, bool [S, S] or [B, S, S]; default: that of `fit`. Raises ValueError if it does
        not fit the images or covers no token of one, or if there is none but `fit` was given one for every image.
        """
        return self.inside(self._checked(images), self._region(images, roi))

    def fit_features(self, normals: NormalFeatures, progress: Progress | None) -> None:
        """Fit on the features of the normal images."""
        raise NotImplementedError

    def from_features(self, features: FeatureMaps, region: RegionOfInterest | None = None) -> Prediction:
        """L levels [B, C_l, H_l, W_l] -> scores [B] of what is in the region, maps [B, S, S], arbitrary outside it."""
        raise NotImplementedError

    def from_members(
        self, images: Tensor, predictions: Sequence[Prediction], region: RegionOfInterest | None = None
    ) -> Prediction:
        """Predict from the members' predictions for images [B, 3, S, S] in the region, if the detector is made of
        others."""
        raise NotImplementedError

    def traceable(self) -> Self:
        """Return a copy of the fitted detector whose `from_features` or `from_members` torch.export can trace: for any
        number of images, with constants for all that was fitted. ValueError with the reason if there is none."""
        return copy.copy(self)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the fitted state to save: tensors, and facts that are JSON."""
        raise NotImplementedError

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Restore the fitted state from tensors and facts of `state`."""
        raise NotImplementedError

    def keep_roi(self, roi: Tensor | None) -> RegionOfInterest | None:
        """Remember the region of interest, if it is one for all images, and return it."""
        region = None if roi is None else RegionOfInterest(roi)
        self.roi = roi if region is not None and region.shared else None
        self.roi_each = region is not None and not region.shared
        return region

    def _region(self, images: Tensor, roi: Tensor | None) -> RegionOfInterest | None:
        """The region of interest of images to predict: the given one, or that of the fit."""
        roi = self.roi if roi is None else roi
        if roi is not None:
            return RegionOfInterest(roi).exactly(images)
        if self.roi_each:
            raise ValueError(
                "the detector was fitted with a region of interest for each image: give predict one, roi=[B, S, S]"
            )
        return None

    def inside(self, features: FeatureMaps, region: RegionOfInterest | None) -> Prediction:
        """Predict from features what is in the region."""
        if region is None:
            return self.from_features(features)
        found = self.from_features(features, region)
        return Prediction(found.scores, region.only(found.maps))

    def _checked(self, images: Tensor) -> FeatureMaps:
        self.check_fitted()
        check_images(images)
        self._check_side(images)
        return self.seen(images, self._features(images))

    def seen(self, images: Tensor, features: FeatureMaps) -> FeatureMaps:
        """Return what `from_features` takes for images [B, 3, S, S]: their ``features``, unless the fitted detector has
        a network of its own that sees the images, too."""
        return features

    def _features(self, images: Tensor) -> FeatureMaps:
        return checked_features(self.extract, images)

    def _check_side(self, images: Tensor) -> None:
        if images.shape[2] != self.side:
            raise ValueError(
                f"images have {images.shape[2]} pixels, but the detector was fitted on {self.side}: prepare them alike"
            )

    def check_fitted(self) -> None:
        """Raise ValueError if the detector is not fitted."""
        if not self.fitted:
            raise ValueError(
                f"this {type(self).__name__} is not fitted: call fit(normal_batches) or from_pretrained first"
            )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Save the fitted detector, which HOLDS FEATURES OF THE PRODUCT (`downstream.saved`), and return the path.

        Raises ValueError before `fit`, if ``folder`` holds other files, or if a member cannot be saved.
        """
        self.check_fitted()
        tensors, facts = self.state()
        tensors, facts = with_roi(tensors, facts, self.roi, self.roi_each)
        options = {} if self.options is None else dataclasses.asdict(self.config)
        made_of = [member.save_pretrained for member in self.members] or self.extract
        return save_detector(folder, self.name, options, made_of, tensors, self.side, facts)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        extract: Extract | Sequence[Extract] | None = None,
        device: str | torch.device | None = None,
        weights: str | os.PathLike[str] | None = None,
        **hub: Unpack[HubOptions],
    ) -> Self:
        """Load a folder written by `save_pretrained`. Arguments and errors are those of `saved.load_detector`."""
        loaded = load_detector(folder, cls.name, cls.options, extract, device, weights, cls.load_member, **hub)
        with put_together(loaded.folder):
            detector = cls._unfitted(loaded)
            detector.side = loaded.image_size
            detector.roi, detector.roi_each = loaded.tensors.pop(ROI, None), bool(loaded.facts.get(ROI_EACH))
            detector.restore(loaded.tensors, loaded.facts)
            if not loaded.members:
                detector._try(loaded.device)
        return detector

    def _try(self, device: torch.device) -> None:
        """Use the loaded detector once, so that a state that does not fit is found now."""
        picture = fixed_picture(self.side, device)
        self.predict(picture, torch.ones_like(picture[:, 0], dtype=torch.bool) if self.roi_each else None)

    @classmethod
    def _unfitted(cls, loaded: Loaded) -> Self:
        """Make the saved detector, still without its fitted state."""
        return cls(loaded.extract, loaded.options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        tag: str | None = None,
        branch: str = "main",
        message: str | None = None,
        token: str | bool | None = None,
        dry_run: bool = False,
    ) -> Published:
        """Publish the saved detector as one commit of a Hub repository; see `adpretrain.hub.upload.publish`.

        The repository is PRIVATE by default, and a warning says why. Raises the errors of `publish` and
        `save_pretrained`.
        """
        message = message or f"Publish a fitted {type(self).__name__}"
        options: dict[str, Any] = {"tag": tag, "branch": branch, "message": message, "token": token}
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.save_pretrained(Path(scratch) / "detector")
            return publish_saved(folder, repo_id, private=private, dry_run=dry_run, **options)
