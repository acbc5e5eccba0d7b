"""What the extractor adds to its bare backbone: CPU time of one process, one thread, the best of interleaved repeats.

Run by `make bench`. Times do not depend on the weights' values, so random ones serve and nothing is downloaded.
"""

from __future__ import annotations

import pytest
import torch
from clock import interleaved_cpu_seconds

from adpretrain.backbones import load_backbone
from adpretrain.config import ProjectorConfig
from adpretrain.extractor import ADExtractor
from adpretrain.projector import FeatureProjector

pytestmark = pytest.mark.benchmark

BATCH, SHOTS, TARGET = 4, 8, 1.6


@torch.no_grad()
def test_extractor_over_bare_backbone(one_thread: None) -> None:
    """DINOv2-base geometry: 12 blocks of width 768, 16 x 16 tokens at 224 px, four levels; projector of the paper."""
    torch.manual_seed(0)
    backbone = load_backbone("dinov2-base", pretrained=False)
    config = ProjectorConfig(references=2048, heads=16, mlp_ratio=4.0)
    projector = FeatureProjector(backbone.channels, config)
    for parameter in projector.parameters():  # untrained, it would return its input whatever the attention does
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    extractor = ADExtractor(backbone, projector)
    images = torch.randn(BATCH, 3, 224, 224)
    banks = extractor.encode_references(torch.randn(SHOTS, 3, 224, 224))
    extractor.set_references(banks)
    projected = extractor(images)  # this also fills the caches of keys, values and search indices

    features = backbone(images)
    assert [tuple(level.shape) for level in features] == [(BATCH, 768, 16, 16)] * 4
    assert [bank.shape[1] for bank in banks.levels] == [SHOTS * 256] * 4
    residuals = banks.residuals(features)
    assert not any(torch.equal(a, b) for a, b in zip(projected, residuals, strict=True))
    seconds = interleaved_cpu_seconds(
        {
            "backbone": lambda: backbone(images),
            "extractor": lambda: extractor(images),
            "matching": lambda: banks.residuals(features),
            "projector": lambda: projector(residuals),
        },
        repeats=5,
    )
    ratio = seconds["extractor"] / seconds["backbone"]
    print(
        f"\nextractor over bare backbone, DINOv2-base geometry, batch {BATCH}, K = {SHOTS}, N_r = 2048, 16 heads, one "
        f"thread: {seconds['extractor']:.2f} s / {seconds['backbone']:.2f} s = {ratio:.2f} x; shares of the backbone: "
        + ", ".join(f"{part} {seconds[part] / seconds['backbone']:.2f}" for part in ("matching", "projector"))
    )
    assert ratio <= TARGET
