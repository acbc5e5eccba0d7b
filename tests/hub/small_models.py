"""A small extractor to publish, made the same in every process, and pictures for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from adpretrain.backbones import load_backbone
from adpretrain.config import ProjectorConfig
from adpretrain.extractor import ADExtractor
from adpretrain.projector import FeatureProjector

SIDE = 64


def make_extractor(seed: int = 0) -> ADExtractor:
    """Lite0 with a small random projector, as if it had been trained on photographs of one's own."""
    torch.manual_seed(seed)
    backbone = load_backbone("lite0", image_size=SIDE)
    config = ProjectorConfig(references=16, heads=1)
    provenance = {"seed": seed, "data": {"set": "parts", "images": 9, "categories": 3, "licence": "own"}}
    return ADExtractor(backbone, FeatureProjector(backbone.channels, config), provenance=provenance)


def pictures(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Saved:
    """A saved extractor's folder, without a card."""

    folder: Path

    def contents(self) -> dict[str, bytes]:
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in files}
