"""Pretraining batches as features: from images through the backbone, or from features encoded once before training.

Shapes: B images, V views, L levels, T tokens per image, C channels, K references of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from adpretrain.backbones import FeatureMaps, References
from adpretrain.data.pairs import PretrainingSet, StepBatches
from adpretrain.extractor import ADExtractor
from adpretrain.residual import tokens


@dataclass
class EncodedBatch:
    """Features of B images whose references are grouped by K.

    ``views``: V lists of L levels [B, C_l, H_l, W_l]; ``groups``: (K, banks) of consecutive images, L levels of
    [b, K * T_l, C_l] each, sum of b = B; ``masks``: bool [B, S, S].
    """

    views: list[FeatureMaps]
    groups: list[tuple[int, References]]
    masks: Tensor


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items of a `PretrainingSet` -> one batch, ordered by K so that equal numbers of references stack."""
    ordered = sorted(items, key=lambda item: item["references"].shape[0])
    counts = [item["references"].shape[0] for item in ordered]
    groups = [
        torch.stack([item["references"] for item in ordered if item["references"].shape[0] == count])
        for count in sorted(set(counts))
    ]
    return {
        "views": torch.stack([item["views"] for item in ordered]),
        "references": groups,
        "masks": torch.stack([item["mask"] for item in ordered]),
    }


class OnlineBatches:
    """Images loaded by worker processes and encoded by the backbone, step by step."""

    def __init__(self, extractor: ADExtractor, data: PretrainingSet, workers: int, device: torch.device) -> None:
        self.extractor, self.data, self.workers, self.device = extractor, data, workers, device

    def __call__(self, steps: StepBatches) -> Iterator[EncodedBatch]:
        loader = DataLoader(
            self.data,
            batch_sampler=steps,
            collate_fn=collate,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        for batch in loader:
            yield self._encode(batch)

    @torch.no_grad()
    def _encode(self, batch: dict[str, Any]) -> EncodedBatch:
        views = [self.extractor.encode(view.to(self.device, non_blocking=True)) for view in batch["views"].unbind(1)]
        groups = [
            (images.shape[1], self.extractor.encode_references(images.to(self.device, non_blocking=True)))
            for images in batch["references"]
        ]
        return EncodedBatch(views, groups, batch["masks"].to(self.device))


class CachedBatches:
    """Features of every view and every plain image, encoded once and held in memory.

    Exact for a frozen backbone when each image keeps its views (augment "once" or "none").
    """

    def __init__(
        self, extractor: ADExtractor, data: PretrainingSet, device: torch.device, progress: Any = iter
    ) -> None:
        self.data, self.device = data, device
        self.plain: list[list[Tensor]] = []
        self.views: list[list[list[Tensor]]] = []
        self.masks: list[Tensor] = []
        for index in progress(range(len(data))):
            self.plain.append(self._encode(extractor, data.plain(index)))
            augmented = data.views(index, epoch=0) if data.augment != "none" else []
            self.views.append([self._encode(extractor, view) for view in augmented] or [self.plain[-1]])
            self.masks.append(data.mask(index))

    def _encode(self, extractor: ADExtractor, image: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [level[0] for level in extractor.encode(image[None].to(self.device))]

    def __call__(self, steps: StepBatches) -> Iterator[EncodedBatch]:
        for batch in steps:
            chosen = [(index, self.data.draw_references(index, epoch)) for epoch, index in batch]
            chosen.sort(key=lambda item: len(item[1]))
            indices = [index for index, _ in chosen]
            views = [
                [torch.stack(level) for level in zip(*(self.views[index][view] for index in indices), strict=True)]
                for view in range(len(self.views[0]))
            ]
            groups = []
            for shots in sorted({len(references) for _, references in chosen}):
                rows = [references for _, references in chosen if len(references) == shots]
                groups.append((shots, self._banks(rows)))
            masks = torch.stack([self.masks[index] for index in indices]).to(self.device)
            yield EncodedBatch(views, groups, masks)

    def _banks(self, rows: list[list[int]]) -> References:
        return [
            torch.stack([tokens(torch.stack([self.plain[i][level] for i in row])).flatten(0, 1) for row in rows])
            for level in range(len(self.plain[0]))
        ]
