"""What `adpretrain info` counts, against the formula of ADPretrain Sec. 3.3 written out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from adpretrain.backbones import load_backbone
from adpretrain.config import BackboneConfig
from adpretrain.extractor import ADExtractor
from adpretrain.preprocess import Preprocess
from adpretrain.projector import FeatureProjector
from adpretrain.saved import ExtractorConfig, ProjectorConfig
from downstream.cli import main
from downstream.commands.info import projector_cost


def per_image(width: int, patches: int, references: int) -> int:
    """Query, scores, their sum over values, output, and an MLP of ratio 4: multiply-adds x 2."""
    attention = 2 * patches * width * width + 2 * patches * references * width
    return 2 * (attention + 2 * patches * width * 4 * width)


def test_flops_of_the_papers_projectors() -> None:
    """Four levels of DINOv2-base (16 x 16 patches) and CLIP-base (14 x 14), and a residual network's two grids."""
    for name, side, widths, grids in (
        ("dinov2-base", 224, [768] * 4, [16] * 4),
        ("clip-base", 224, [768] * 4, [14] * 4),
        ("timm/wide_resnet50_2.tv_in1k", 256, [512, 1024], [32, 16]),
    ):
        levels = [2, 3] if name.startswith("timm") else None
        preprocess = Preprocess(side, side)
        config = ExtractorConfig(BackboneConfig(name, side, levels=levels), widths, preprocess, ProjectorConfig())
        found = projector_cost(config, Path("extractor"))
        assert found["projector FLOPs per image"] == sum(
            per_image(width, grid * grid, 2048) for width, grid in zip(widths, grids, strict=True)
        )
        # The references' projection, their keys and their values: 2048 rows of width x width, three times.
        assert found["projector FLOPs once"] == sum(2 * 3 * 2048 * width * width for width in widths)
        with torch.device("meta"):
            parameters = FeatureProjector(widths, ProjectorConfig()).parameters()
        assert found["projector parameters"] == sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize("architecture", ["linear", "mlp", "self_attention", "cross_attention"])
def test_every_architecture_has_a_cost(architecture: str) -> None:
    backbone = BackboneConfig("lite0", 64, levels=[3])
    projector = ProjectorConfig(architecture, heads=2)
    found = projector_cost(ExtractorConfig(backbone, [112], Preprocess(64, 64), projector), Path("extractor"))
    patches, context = 16, 4 * 112 * 112 * 16  # keys and values of one reference's 4 x 4 residuals
    expected = {
        "linear": 2 * patches * 112 * 112,
        "mlp": 2 * 2 * patches * 112 * 448,
        "self_attention": per_image(112, patches, patches) + context,
        "cross_attention": per_image(112, patches, patches),
    }[architecture]
    assert found["projector FLOPs per image"] == expected
    assert found["projector FLOPs once"] == (context if architecture == "cross_attention" else 0)


def test_info_prints_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = load_backbone("lite0", image_size=64)
    config = ProjectorConfig(references=16, heads=3)
    ADExtractor(backbone, FeatureProjector(backbone.channels, config)).save_pretrained(tmp_path / "ours")
    assert main(["info", str(tmp_path / "ours"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    widths = [-(-width // 3) * 3 for width in backbone.channels]  # three heads of equal width
    assert facts["projector FLOPs once"] == sum(
        2 * 16 * width * (width + 2 * inner) for width, inner in zip(backbone.channels, widths, strict=True)
    )
    ADExtractor(backbone).save_pretrained(tmp_path / "none")
    assert main(["info", str(tmp_path / "none")]) == 0
    assert "FLOPs" not in capsys.readouterr().out
