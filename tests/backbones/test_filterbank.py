"""The filterbank: shapes, invariances that follow from its definition, and gratings seen by the right filters."""

import math

import pytest
import torch
from torch import Tensor

from adpretrain.backbones import BACKBONES, load_backbone
from adpretrain.backbones.filterbank import OCTAVES, ORIENTATIONS, gabor_pairs


def noise(images: int = 2, side: int = 64, seed: int = 0) -> Tensor:
    """Smooth coloured noise in 0.2 .. 0.8."""
    small = torch.rand(images, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(seed))
    return 0.2 + 0.6 * torch.nn.functional.interpolate(small, size=side, mode="bilinear")


@pytest.mark.parametrize("side", [64, 96, 224])
def test_four_levels_on_one_grid(side: int) -> None:
    backbone = load_backbone("filterbank", image_size=side)
    features = backbone(noise(side=side))
    assert backbone.channels == [29, 29, 29, 30]
    assert [f.shape for f in features] == [(2, width, side // 8, side // 8) for width in backbone.channels]
    assert all(f.isfinite().all() for f in features)
    assert backbone.preprocess.image_size == side
    assert not list(backbone.parameters())
    assert not backbone.state_dict()
    assert not backbone.train().training


def test_an_image_s_features_do_not_depend_on_its_batch() -> None:
    backbone, images = load_backbone("filterbank", image_size=64), noise(3)
    for index, image in enumerate(images):
        for batch, alone in zip(backbone(images), backbone(image[None]), strict=True):
            torch.testing.assert_close(batch[index], alone[0], rtol=1e-4, atol=1e-6)


def test_autocast_is_left_out() -> None:
    backbone, images = load_backbone("filterbank", image_size=64), noise()
    expected = backbone(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = backbone(images)
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))


def test_flat_images_of_any_colour_look_alike() -> None:
    colours = torch.tensor([[0.1, 0.1, 0.1], [0.9, 0.9, 0.9], [0.9, 0.2, 0.1]])[:, :, None, None].expand(-1, -1, 64, 64)
    for level in load_backbone("filterbank", image_size=64)(colours):
        torch.testing.assert_close(level, level[:1, :, :1, :1].expand_as(level), rtol=0, atol=1e-4)


def test_exposure_hardly_matters_and_a_defect_does() -> None:
    """Halving the light moves the features far less than a small dark spot does where it lies."""
    backbone, image = load_backbone("filterbank", image_size=64), noise(1)
    spot = image.clone()
    spot[:, :, 24:32, 40:48] = 0.05
    base, dim, marked = (torch.cat(backbone(x), 1)[0] for x in (image, image * 0.5, spot))
    exposure, defect = (base - dim).norm(dim=0), (base - marked).norm(dim=0)
    assert defect[3, 5] > 5 * exposure.max()
    assert divmod(int(defect.argmax()), 8) in [(y, x) for y in (2, 3, 4) for x in (4, 5, 6)]


@pytest.mark.parametrize("index", range(ORIENTATIONS))
def test_a_grating_excites_its_own_orientation(index: int) -> None:
    theta = math.pi * index / ORIENTATIONS
    ys, xs = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    grating = 0.5 + 0.3 * torch.cos(2 * math.pi * (xs * math.cos(theta) + ys * math.sin(theta)) / 4.6)
    level = load_backbone("filterbank", image_size=64)(grating.expand(1, 3, -1, -1))[0]
    energy = level[0, :ORIENTATIONS, 2:-2, 2:-2].mean((1, 2))
    assert energy.argmax() == index


def test_the_octave_of_a_grating_follows_its_wavelength() -> None:
    backbone = load_backbone("filterbank", image_size=128)
    xs = torch.arange(128.0).expand(1, 3, 128, 128)
    best = []
    for octave in range(3):
        grating = 0.5 + 0.3 * torch.cos(2 * math.pi * xs / (4.6 * 2**octave))
        best.append(int(torch.stack([level[0, 0].mean() for level in backbone(grating)]).argmax()))
    assert best == [0, 1, 2]
    assert OCTAVES == 4


def test_the_filters_ignore_flat_regions() -> None:
    filters = gabor_pairs()
    assert filters.shape == (2 * ORIENTATIONS, 1, 7, 7)
    torch.testing.assert_close(filters.abs().sum((1, 2, 3)), torch.ones(2 * ORIENTATIONS))
    torch.testing.assert_close(filters.sum((1, 2, 3)), torch.zeros(2 * ORIENTATIONS), rtol=0, atol=1e-6)


def test_errors_name_the_choices() -> None:
    with pytest.raises(ValueError, match=f"'resnet9000' is unknown.*{next(iter(BACKBONES))}"):
        load_backbone("resnet9000")
    for side in (0, 48, 100):
        with pytest.raises(ValueError, match=f"multiple of 16; got {side}"):
            load_backbone("filterbank", image_size=side)
    backbone = load_backbone("filterbank", image_size=64)
    for shape in ((1, 3, 96, 96), (3, 64, 64), (1, 1, 64, 64)):
        with pytest.raises(ValueError, match=r"images \[B, 3, 64, 64\] of floats with B > 0, got"):
            backbone(torch.zeros(shape))
