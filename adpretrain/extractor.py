"""`ADExtractor`: backbone + nearest normal references + projector = anomaly-detection features, saved and loaded.

Shapes: B images, K reference images, S side, T tokens per image, L levels, C_l channels; R = 1 or B reference banks.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adpretrain.backbones import Backbone, FeatureMaps, References
from adpretrain.backbones.fingerprint import fingerprint
from adpretrain.backbones.weights import as_float32
from adpretrain.card import card
from adpretrain.config import ProjectorConfig
from adpretrain.hub import Published, locate, publish
from adpretrain.local_scale import LocalScale
from adpretrain.preprocess import Preprocess
from adpretrain.projector import FeatureProjector
from adpretrain.residual import (
    MATCHING,
    SearchIndex,
    checked_banks,
    images_in_bank,
    leave_one_out_residuals,
    residual_features,
    search_index,
    tokens,
)
from adpretrain.saved import (
    CARD_NAME,
    NORMS,
    ExtractorConfig,
    backbone_config,
    extractor_backbone,
    place,
    read_config,
    read_weights,
    saved_local_scale,
    saved_projector,
    saved_tensors,
    write_folder,
)
from adpretrain.saved import build_projector as build_projector


class ADExtractor(nn.Module):
    """Projected residual features: a drop-in for a raw backbone in every detector.

    ``extractor.set_references(images)`` with a few photographs of normal products, then ``extractor(images)``.
    Without a projector the features are the (scaled) residuals themselves, the baseline of every comparison.
    The reference features are never saved: they belong to whoever made the photographs.
    """

    def __init__(
        self,
        backbone: Backbone,
        projector: FeatureProjector | None = None,
        projector_config: ProjectorConfig | None = None,
        local_scale: LocalScale | None = None,
        centers: list[Tensor] | None = None,
        matching: str = "l2",
        norm: str = "l2",
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if matching not in MATCHING:
            raise ValueError(f"matching metric {matching!r} is unknown; choose one of {MATCHING}")
        if matching == "none" and (local_scale is not None or (projector and projector.needs_reference_residuals)):
            raise ValueError("matching 'none' has no references, which a local scale and cross attention need")
        if norm not in NORMS:
            raise ValueError(f"norm {norm!r} is unknown; choose one of {NORMS}")
        if (projector is None) != (projector_config is None):
            raise ValueError("projector and projector_config are given together or not at all")
        self.backbone, self.projector, self.local_scale = backbone, projector, local_scale
        self.config = ExtractorConfig(
            backbone=backbone_config(backbone),
            channels=backbone.channels,
            preprocess=backbone.preprocess,
            projector=projector_config,
            matching=matching,
            norm=norm,
            local_scale=None if local_scale is None else local_scale.config,
            fingerprint=fingerprint(backbone.network),
            provenance=provenance or {},
        )
        for level, width in enumerate(backbone.channels):
            self.register_buffer(f"center_{level}", centers[level] if centers else torch.zeros(width))
        self._references: References | None = None
        self._scales: list[Tensor] | None = None
        self._indices: list[SearchIndex] | None = None
        self.eval()

    @property
    def preprocess(self) -> Preprocess:
        """Photograph -> network input."""
        return self.backbone.preprocess

    @property
    def channels(self) -> list[int]:
        """C_l of each level."""
        return self.backbone.channels

    @property
    def references(self) -> References | None:
        """The banks given to `set_references`, or None."""
        return self._references

    def without_projector(self) -> ADExtractor:
        """The same extractor up to the residuals: the baseline that the projector is measured against."""
        raw = ADExtractor(
            self.backbone, local_scale=self.local_scale, matching=self.config.matching, norm=self.config.norm
        )
        raw._references, raw._scales, raw._indices = self._references, self._scales, self._indices
        return raw

    def encode(self, images: Tensor) -> FeatureMaps:
        """[B, 3, S, S] -> L levels of backbone features [B, C_l, H_l, W_l]."""
        return self.backbone(images)

    @torch.no_grad()
    def encode_references(self, images: Tensor) -> References:
        """K normal photographs [K, 3, S, S] -> one shared bank per level [1, K * T, C_l].

        [B, K, 3, S, S] gives one bank per image of a batch: [B, K * T, C_l]. The tokens of a photograph stay
        together, in order.
        """
        if images.ndim == 4:
            images = images[None]
        if images.ndim != 5 or images.shape[1] == 0:
            raise ValueError(
                f"references must be [K, 3, S, S] or [B, K, 3, S, S] with K > 0, got {tuple(images.shape)}"
            )
        banks = images.shape[0]
        return [tokens(level).reshape(banks, -1, level.shape[1]) for level in self.encode(images.flatten(0, 1))]

    def set_references(self, images: Tensor | References) -> ADExtractor:
        """Keep the references of every later call: images [K, 3, S, S], or banks from `encode_references`; ValueError
        for anything else. A reference's own residuals are zero: fit a detector on other photographs than these."""
        given = self.encode_references(images) if isinstance(images, Tensor) else images
        self._references = checked_banks(given, self.channels)
        self._scales = self._indices = None
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> ADExtractor:
        super()._apply(fn, recurse)
        if self._references is not None:
            self._references = [fn(bank) for bank in self._references]
        self._scales = self._indices = None
        return self

    def scales(self, features: FeatureMaps, references: References) -> list[Tensor] | None:
        """The scale of every reference token, L levels of [R, N_l]; None without a local scale.

        Only the sizes of ``features`` are used. Those of the kept references are computed once.
        """
        if self.local_scale is None:
            return None
        if references is self._references and self._scales is not None:
            return self._scales
        images_in_bank(features, references)
        grids = [(int(level.shape[2]), int(level.shape[3])) for level in features]
        scales = self.local_scale.scales(references, grids, self.config.matching)
        if references is self._references:
            self._scales = scales
        return scales

    def indices(self, references: References) -> list[SearchIndex] | None:
        """The banks made ready for searching: once for the kept references; None for those of one call."""
        if references is not self._references or references[0].shape[0] != 1:
            return None
        if self._indices is None:
            self._indices = [search_index(bank[0], self.config.matching) for bank in references]
        return self._indices

    def residuals(
        self, features: FeatureMaps, references: References, scales: list[Tensor] | None = None
    ) -> FeatureMaps:
        """Encoded features and banks -> residual features of the same shapes, divided by ``scales`` if given."""
        indices = self.indices(references)
        return residual_features(features, references, self.config.matching, scales=scales, indices=indices)

    def reference_residuals(self, references: References, shots: int, scales: list[Tensor] | None) -> References:
        """The references' residuals among themselves, context of the cross-attention ablations: L of [R, N_l, C_l]."""
        metric, out = self.config.matching, []
        for level, bank_RNC in enumerate(references):
            context = torch.stack([leave_one_out_residuals(bank, shots, metric) for bank in bank_RNC])
            out.append(context if scales is None else context / scales[level][..., None])
        return out

    def from_encoded(self, features: FeatureMaps, references: References) -> FeatureMaps:
        """Encoded features and banks -> the extractor's output: everything after the backbone."""
        shots = images_in_bank(features, references)
        scales = self.scales(features, references)
        return self.project(self.residuals(features, references, scales), references, shots, scales)

    def project(
        self, residuals: FeatureMaps, references: References, shots: int, scales: list[Tensor] | None
    ) -> FeatureMaps:
        """Residuals -> projected features; the references feed the cross-attention ablations only."""
        if self.projector is None:
            return self.weighted(residuals)
        if not self.projector.needs_reference_residuals:
            return self.weighted(self.projector(residuals))
        return self.weighted(self.projector(residuals, self.reference_residuals(references, shots, scales)))

    def weighted(self, features: FeatureMaps) -> FeatureMaps:
        """Each level times the weight that the local scale gives it."""
        return features if self.local_scale is None else self.local_scale.weighted(features)

    @torch.no_grad()
    def forward(self, images: Tensor, references: References | None = None) -> FeatureMaps:
        """Features for anomaly detection: [B, 3, S, S] -> L levels [B, C_l, H_l, W_l], without gradients.

        ``references``: banks from `encode_references` for this call only (shared, or one per image); otherwise those
        of `set_references`. Runs under ``torch.autocast`` if the caller asks for it, and under ``torch.compile``;
        not in inference mode: a detector may train on the results. Raises ValueError without references, unless
        ``matching`` is "none".
        """
        if self.config.matching == "none":
            features = self.encode(images)
            return features if self.projector is None else self.projector(features)
        references = references if references is not None else self._references
        if references is None:
            raise ValueError("no references: call set_references(normal_images) first, or pass references=")
        return self.from_encoded(self.encode(images), references)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write config.json, model.safetensors (projector, centres, local scale; never the backbone or references)
        and README.md, its card. The folder appears, or is replaced, only when complete. Returns its path.

        Raises ValueError if ``folder`` holds other files: replacing it would delete them.
        """
        weights = {k: v for k, v in self.state_dict().items() if not k.startswith("backbone.")}
        return write_folder(folder, self.config, weights, "extractor", card(self.config))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        tag: str | None = None,
        branch: str = "main",
        message: str | None = None,
        token: str | bool | None = None,
        dry_run: bool = False,
        readme: str | None = None,
    ) -> Published:
        """Publish what `save_pretrained` writes as one commit of a Hub repository: arguments and errors as in
        `adpretrain.hub.publish`. ``readme``: a text for README.md instead of `adpretrain.card.card`.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.save_pretrained(Path(scratch) / "extractor")
            (folder / CARD_NAME).write_text(readme or card(self.config, repo_id), encoding="utf-8")
            message = message or f"Publish an extractor on {self.config.backbone.name}"
            options: dict[str, Any] = {"tag": tag, "branch": branch, "message": message, "token": token}
            return publish(folder, repo_id, private=private, dry_run=dry_run, **options)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        device: str | torch.device | None = None,
        weights: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        backbone: Backbone | None = None,
    ) -> ADExtractor:
        """Load a saved extractor, strictly, in evaluation mode on ``device``; None = where ``backbone`` is, or the CPU.

        ``source``: a folder that `save_pretrained` wrote, the id "org/name" of a Hub repository, or "embedded"; with
        ``revision`` (a branch, tag or commit) and ``token`` as in `adpretrain.hub.locate`. ``weights``: a local file
        or folder of the backbone's weights, for machines without a network. ``backbone``: used instead of loading one,
        such as a `Backbone` of your own, or with random weights, which no name finds again.

        Raises ValueError if there is no such extractor, it was written by a newer library, or if its weights, or the
        backbone's, are not exactly those its config describes.
        """
        folder = locate(source, revision, token=token).folder
        config = read_config(folder)
        backbone = extractor_backbone(config, folder, weights, backbone)
        extractor = cls(
            backbone,
            projector=saved_projector(config.projector, config.channels, folder) if config.projector else None,
            projector_config=config.projector,
            local_scale=saved_local_scale(config, folder),
            matching=config.matching,
            norm=config.norm,
            provenance=config.provenance,
        )
        extractor.config = config
        weights_read = as_float32(read_weights(folder, saved_tensors(config, folder)))
        extractor.load_state_dict(weights_read, strict=False, assign=True)  # lacks the backbone's keys only
        return extractor.to(device if device is not None else place(backbone))
