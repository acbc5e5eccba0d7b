"""Images prepared for one network, fed to another: as good as prepared for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from adpretrain.backbones import Backbone, load_backbone
from adpretrain.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Preprocess
from downstream.detectors import detector_from_pretrained
from downstream.detectors.ensemble import Ensemble
from downstream.detectors.patchcore import PatchCore, PatchCoreConfig
from downstream.extracts import Adapted

CLIP = Preprocess(96, None, CLIP_MEAN, CLIP_STD, "bilinear")


def network(size: int) -> Backbone:
    """Lite0, made to expect another normalisation (it does not mind which)."""
    backbone = load_backbone("lite0", image_size=size)
    backbone.preprocess = Preprocess(size, None, IMAGENET_MEAN, IMAGENET_STD, "bilinear")
    return backbone


def picture(seed: int) -> Image.Image:
    """Smooth, as photographs are: two ways to resize then agree."""
    coarse = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(seed))
    pixels = torch.nn.functional.interpolate(coarse[None], 96, mode="bicubic")[0].clamp(0, 1)
    return Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy())


def test_another_normalisation() -> None:
    image, backbone = picture(0), network(96)
    found = Adapted(backbone, CLIP)(CLIP(image)[None])
    for level, expected in zip(found, backbone(backbone.preprocess(image)[None]), strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)


def test_another_size() -> None:
    """96 -> 64 pixels: what resizing the 8-bit picture gives, but for its rounding to 1 / 255."""
    image, backbone = picture(1), network(64)
    direct = backbone.preprocess(image)
    seen: list[torch.Tensor] = []
    backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = Adapted(backbone, CLIP)(CLIP(image)[None])
    assert found[0].shape[2:] == (8, 8)
    assert float((seen[0][0] - direct).abs().max()) < 1.5 / 255 / min(IMAGENET_STD)
    with pytest.raises(ValueError, match=r"expected images of 96 pixels, got \(1, 3, 64, 64\)"):
        Adapted(backbone, CLIP)(torch.rand(1, 3, 64, 64))


def test_an_ensemble_of_networks_and_sizes(tmp_path: Path) -> None:
    """PatchCore's largest system in small; saved and loaded as a whole."""
    normal = torch.stack([CLIP(picture(seed)) for seed in range(6)])
    query = CLIP(picture(9))[None].clone()
    query[..., 40:56, 40:56] = query.amin()
    members = [
        PatchCore(Adapted(network(size), CLIP), PatchCoreConfig(amount=0.2, reweight=0)) for size in (64, 96, 128)
    ]
    detector = Ensemble(members).fit(normal.split(4))
    found = detector.predict(query)
    assert found.maps.shape == (1, 96, 96)
    y, x = divmod(int(found.maps[0].argmax()), 96)
    assert 36 <= y < 60
    assert 36 <= x < 60
    member = detector_from_pretrained(members[2].save_pretrained(tmp_path / "member"))
    assert torch.equal(member.predict(query).maps, members[2].predict(query).maps)
