"""`ADExtractor`: backbone + nearest normal references + projector = anomaly-detection features, saved and loaded.

Shapes: B images, K reference images, S side, T tokens per image, L levels, C_l channels; R = 1 or B reference banks.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adpretrain.backbones import Backbone, FeatureMaps
from adpretrain.backbones.table import licence_of
from adpretrain.backbones.weights import as_float32, fingerprint
from adpretrain.hub.download import locate
from adpretrain.local_scale import LocalScale
from adpretrain.preprocess import Preprocess
from adpretrain.projector import FeatureProjector
from adpretrain.references import ReferenceBank
from adpretrain.residual import MATCHING
from adpretrain.saved import (
    CARD_NAME,
    NORMS,
    ExtractorConfig,
    backbone_config,
    extractor_backbone,
    place,
    read_config,
    read_weights,
    saved_parts,
    saved_tensors,
    with_image_size,
    write_folder,
)

if TYPE_CHECKING:
    from adpretrain.hub.upload import Published


class ADExtractor(nn.Module):
    """Projected residual features: a drop-in for a raw backbone in every detector.

    Call ``extractor.set_references(images)`` with a few photographs of normal products, then ``extractor(images)``.
    Without a projector the features are the (scaled) residuals themselves, the baseline of every comparison.
    The reference features are never saved: they belong to whoever made the photographs.
    """

    def __init__(
        self,
        backbone: Backbone,
        projector: FeatureProjector | None = None,
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
        self.backbone, self.projector, self.local_scale = backbone, projector, local_scale
        self.config = ExtractorConfig(
            backbone=backbone_config(backbone),
            channels=backbone.channels,
            preprocess=backbone.preprocess,
            projector=None if projector is None else projector.config,
            matching=matching,
            norm=norm,
            local_scale=None if local_scale is None else local_scale.config,
            licence=licence_of(backbone.name),
            fingerprint=fingerprint(backbone.network),
            provenance=provenance or {},
        )
        for level, width in enumerate(backbone.channels):
            self.register_buffer(f"center_{level}", centers[level] if centers else torch.zeros(width))
        self._references: ReferenceBank | None = None
        self.eval()

    @property
    def preprocess(self) -> Preprocess:
        """Photograph -> network input."""
        return self.backbone.preprocess

    @property
    def channels(self) -> list[int]:
        """The number of channels C_l of each level."""
        return self.backbone.channels

    @property
    def references(self) -> ReferenceBank | None:
        """The bank that `set_references` keeps, or None."""
        return self._references

    def without_projector(self) -> ADExtractor:
        """The same extractor up to the residuals: the baseline that the projector is measured against."""
        raw = ADExtractor(
            self.backbone, local_scale=self.local_scale, matching=self.config.matching, norm=self.config.norm
        )
        raw._references = self._references
        return raw

    def encode(self, images: Tensor) -> FeatureMaps:
        """[B, 3, S, S] -> L levels of backbone features [B, C_l, H_l, W_l]."""
        return self.backbone(images)

    @torch.no_grad()
    def encode_references(self, images: Tensor) -> ReferenceBank:
        """K normal photographs [K, 3, S, S] -> one bank; [B, K, 3, S, S] gives a bank for each image of a batch.

        Those of one bank are encoded one by one: in a batch, the last bits depend on how many there are, and a
        reference must be the same whether it was there from the start or was added later."""
        if images.ndim not in (4, 5) or images.shape[images.ndim - 4] == 0:
            raise ValueError(
                f"references must be [K, 3, S, S] or [B, K, 3, S, S] with K > 0, got {tuple(images.shape)}"
            )
        if images.ndim == 5:
            return self.bank_of(self.encode(images.flatten(0, 1)), images.shape[0])
        each = [self.encode(image[None]) for image in images]
        return self.bank_of([torch.cat(level) for level in zip(*each, strict=True)])

    def bank_of(self, features: FeatureMaps, banks: int = 1) -> ReferenceBank:
        """The bank of photographs that are already encoded: L levels [R * K, C_l, H_l, W_l], R = ``banks``."""
        return ReferenceBank.of(features, self.config.matching, self.local_scale, banks)

    def set_references(self, images: Tensor | ReferenceBank) -> ADExtractor:
        """Keep the references for all later calls: images [K, 3, S, S], or a bank; ValueError for anything else. The
        references' own residuals are zero: fit a detector on other photographs, or on `leave_one_out`."""
        self._references = self._adopted(self.encode_references(images) if isinstance(images, Tensor) else images)
        return self

    def _adopted(self, bank: ReferenceBank) -> ReferenceBank:
        """The bank with the matching metric and local scale of this extractor, whichever extractor made it."""
        if not isinstance(bank, ReferenceBank):
            raise ValueError(
                "references must be one tensor of images [K, 3, S, S] or a ReferenceBank from encode_references, got "
                f"a {type(bank).__name__}: prepare photographs with .preprocess and torch.stack them"
            )
        if bank.channels != self.channels:
            raise ValueError(
                f"the references have {len(bank.channels)} levels of {bank.channels} channels, this extractor's "
                f"features {len(self.channels)} levels of {self.channels}: were they made with another backbone or "
                "other levels?"
            )
        if bank.metric == self.config.matching and bank.local_scale is self.local_scale:
            return bank
        return ReferenceBank(bank.levels, bank.grids, self.config.matching, self.local_scale, bank.inside)

    def _apply(self, fn: Any, recurse: bool = True) -> ADExtractor:
        super()._apply(fn, recurse)
        if self._references is not None:
            self._references = self._references.apply(fn)
        return self

    def project(self, residuals: FeatureMaps, references: ReferenceBank) -> FeatureMaps:
        """Residuals -> the extractor's output; the references feed the cross-attention ablations only."""
        if self.projector is not None:
            crossed = self.projector.needs_reference_residuals
            residuals = self.projector(residuals, references.context if crossed else None)
        return residuals if self.local_scale is None else self.local_scale.weighted(residuals)

    def from_encoded(self, features: FeatureMaps, references: ReferenceBank) -> FeatureMaps:
        """Encoded features and references -> the extractor's output: everything after the backbone."""
        return self.project(references.residuals(features), references)

    @torch.no_grad()
    def forward(self, images: Tensor, references: ReferenceBank | None = None) -> FeatureMaps:
        """Features for anomaly detection: [B, 3, S, S] -> L levels [B, C_l, H_l, W_l], without gradients.

        ``references`` are used for this call only; the default is those of `set_references`. Runs under the caller's
        ``torch.autocast`` and under ``torch.compile``; not in inference mode, as a detector may train on the results.
        Raises ValueError without references, unless ``matching`` is "none".
        """
        if self.config.matching == "none":
            features = self.encode(images)
            return features if self.projector is None else self.projector(features)
        bank = self._references if references is None else self._adopted(references)
        if bank is None:
            raise ValueError("no references: call set_references(normal_images) first, or pass references=")
        return self.from_encoded(self.encode(images), bank)

    @torch.no_grad()
    def leave_one_out(self, images: Tensor | ReferenceBank | None = None) -> FeatureMaps:
        """The features of each of K normal photographs [K, 3, S, S], or of a bank of them, with the other K - 1 as
        references: L levels [K, C_l, H_l, W_l]. By default the K photographs are those of `set_references`; otherwise
        these are neither used nor changed. Raises ValueError if K < 2, or if there are no photographs."""
        given = self._references if images is None else images
        if given is None:
            raise ValueError("no references to leave out: call set_references(normal_images) first, or give images")
        bank = self._adopted(self.encode_references(given) if isinstance(given, Tensor) else given)
        residuals = bank.leave_one_out()
        if self.projector is None or not self.projector.needs_reference_residuals:
            return self.project(residuals, bank)
        each = ([level[i : i + 1] for level in residuals] for i in range(bank.shots))
        parts = [self.project(residual, bank.without([i])) for i, residual in enumerate(each)]
        return [torch.cat(level) for level in zip(*parts, strict=True)]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write config.json, model.safetensors (projector, centres, local scale; never the backbone or references)
        and README.md, its card. The folder appears, or is replaced, only when complete. Returns its path.

        Raises ValueError if ``folder`` holds other files: replacing it would delete them.
        """
        from adpretrain.card import card

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
        `adpretrain.hub.upload.publish`. ``readme``: a text for README.md instead of `adpretrain.card.card`.
        """
        from adpretrain.card import card
        from adpretrain.hub.upload import publish

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
        image_size: int | None = None,
    ) -> ADExtractor:
        """Load a saved extractor, strictly, in evaluation mode on ``device``; None = where ``backbone`` is, or the CPU.

        ``source``: a folder that `save_pretrained` wrote, the id "org/name" of a Hub repository, or "embedded"; with
        ``revision`` (a branch, tag or commit) and ``token`` as in `adpretrain.hub.download.locate`. ``weights``: a
        local file or folder of the backbone's weights, for machines without a network. ``backbone``: used instead of
        loading one; a `Backbone` that you wrote, or one with random weights, cannot be loaded by name. ``image_size``:
        side of the network's input in pixels, if other than the extractor's own: a larger one shows smaller defects.

        Raises ValueError if there is no such extractor, if a newer library wrote it, or if its weights, or the
        backbone's, are not exactly those that its config describes.
        """
        folder = locate(source, revision, token=token).folder
        config = read_config(folder)
        if image_size is not None and image_size != config.preprocess.image_size:
            config = with_image_size(config, image_size)
        backbone = extractor_backbone(config, folder, weights, backbone)
        projector, local_scale = saved_parts(config, folder)
        extractor = cls(backbone, projector, local_scale, matching=config.matching, norm=config.norm)
        extractor.config = config
        weights_read = as_float32(read_weights(folder, saved_tensors(config, folder)))
        extractor.load_state_dict(weights_read, strict=False, assign=True)  # lacks the backbone's keys only
        return extractor.to(device if device is not None else place(backbone))
