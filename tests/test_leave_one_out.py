"""One pass over all pairs gives what leaving out each photograph in turn gives."""

import pytest
import torch
from torch import Tensor

from adpretrain.backbones import load_backbone
from adpretrain.config import ProjectorConfig
from adpretrain.extractor import ADExtractor
from adpretrain.local_scale import LocalScale
from adpretrain.projector import FeatureProjector
from adpretrain.residual import LeaveOneOut

ROUNDING = 5e-4  # of residuals of some 10, where an image's features depend on how many are with it


def extractor(metric: str, scaled: bool, architecture: str | None) -> ADExtractor:
    torch.manual_seed(0)
    backbone = load_backbone("lite0", image_size=64)
    config = ProjectorConfig(architecture, references=8, heads=2, mlp_ratio=1.0) if architecture else None  # type: ignore[arg-type]
    projector = FeatureProjector(backbone.channels, config) if config else None
    if projector is not None:
        with torch.no_grad():
            for parameter in projector.parameters():
                parameter.normal_(std=0.2)
    scale = LocalScale(len(backbone.channels)) if scaled else None
    return ADExtractor(backbone, projector, scale, matching=metric)


def by_hand(model: ADExtractor, images: Tensor) -> list[Tensor]:
    parts = []
    for image in range(len(images)):
        others = torch.cat([images[:image], images[image + 1 :]])
        parts.append(model(images[image : image + 1], model.encode_references(others)))
    return [torch.cat(level) for level in zip(*parts, strict=True)]


@pytest.mark.parametrize("shots", [2, 3, 5])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("scaled", [True, False])
def test_equals_leaving_out_each_in_turn(shots: int, metric: str, scaled: bool) -> None:
    model = extractor(metric, scaled, "learnable_kv")
    images = torch.rand(shots, 3, 64, 64, generator=torch.Generator().manual_seed(shots))
    for found, expected in zip(model.leave_one_out(images), by_hand(model, images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=ROUNDING)


@pytest.mark.parametrize("architecture", [None, "cross_attention"])
def test_without_a_projector_and_with_cross_attention(architecture: str | None) -> None:
    model = extractor("l2", True, architecture)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(model.leave_one_out(images), by_hand(model, images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=ROUNDING)


def test_the_nearest_in_each_image_equals_brute_force() -> None:
    """Small integers, many equal distances: any of the nearest is right, one of another photograph is not."""
    bank = torch.randint(0, 3, (3, 12, 2), generator=torch.Generator().manual_seed(0)).float()
    index = LeaveOneOut(bank.flatten(0, 1), 3).index_NK
    rows = bank.flatten(0, 1)
    for token in range(36):
        for image in range(3):
            distances = [float((rows[token] - rows[12 * image + other]).square().sum()) for other in range(12)]
            assert int(index[token, image]) // 12 == image
            assert distances[int(index[token, image]) - 12 * image] == min(distances)


def test_a_single_photograph_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 references, got 1"):
        extractor("l2", True, None).leave_one_out(torch.rand(1, 3, 64, 64))
