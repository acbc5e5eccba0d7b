"""Changed images against torchvision's own transforms, and masks that move with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as V

from adpretrain.data import index_dataset
from adpretrain.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from downstream.evaluation.perturbations import ANGLE, LIGHT, SHIFT, SIGMA, Perturbation, PerturbedImages

SIDE = 64


def smooth(seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, SIDE, mode="bicubic")[0].clamp(0, 1)


@pytest.mark.parametrize(
    ("angle", "shift"), [(5.0, (0.0, 0.0)), (-4.0, (2 / SIDE, -1 / SIDE)), (0.0, (-3 / SIDE, 0.0))]
)
def test_geometry_is_torchvisions(angle: float, shift: tuple[float, float]) -> None:
    """Away from the border, which torchvision fills with black. It turns clockwise, then shifts by whole pixels."""
    change, picture = Perturbation(angle, shift, 1.0, 1.0, 0.0), smooth()
    pixels = [round(shift[0] * SIDE), round(shift[1] * SIDE)]
    expected = V.affine(picture, -angle, pixels, 1.0, [0.0, 0.0], interpolation=InterpolationMode.BILINEAR)
    torch.testing.assert_close(change.picture(picture)[:, 9:-9, 9:-9], expected[:, 9:-9, 9:-9], rtol=0, atol=1e-4)
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[20:31, 35:46] = True
    moved = V.affine(mask[None].float(), -angle, pixels, 1.0, [0.0, 0.0])[0] > 0.5
    assert int((change.mask(mask) ^ moved).sum()) <= 4  # nearest neighbours half-way between two pixels


def test_light_and_blur_are_torchvisions() -> None:
    picture = smooth(1)
    lit = V.adjust_contrast(V.adjust_brightness(picture, 1.2), 0.8)
    torch.testing.assert_close(Perturbation(0.0, (0.0, 0.0), 1.2, 0.8, 0.0).picture(picture), lit, rtol=0, atol=2e-3)
    blurred = V.gaussian_blur(picture, [9, 9], [0.9, 0.9])
    found = Perturbation(0.0, (0.0, 0.0), 1.0, 1.0, 0.9).picture(picture)
    torch.testing.assert_close(found[:, 6:-6, 6:-6], blurred[:, 6:-6, 6:-6], rtol=0, atol=1e-3)


def test_draws_cover_the_papers_ranges_and_repeat() -> None:
    drawn = [Perturbation.draw(0, index) for index in range(400)]
    for values, low, high in (
        ([change.angle for change in drawn], -ANGLE, ANGLE),
        ([change.shift[0] for change in drawn], -SHIFT, SHIFT),
        ([change.shift[1] for change in drawn], -SHIFT, SHIFT),
        ([change.brightness for change in drawn], 1 - LIGHT, 1 + LIGHT),
        ([change.contrast for change in drawn], 1 - LIGHT, 1 + LIGHT),
        ([change.sigma for change in drawn], *SIGMA),
    ):
        assert low <= min(values) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(values) <= high
    assert (ANGLE, SHIFT, LIGHT, SIGMA) == (5.0, 0.01, 0.3, (0.1, 1.0))  # suppl. C.1
    assert Perturbation.draw(0, 7) == drawn[7] != Perturbation.draw(1, 7)


def test_items_are_changed_pictures_and_masks(tile_products: Path) -> None:
    """Read, changed in 0..1, normalised again; a flat gray photograph shows its brightness alone."""
    samples = [sample for sample in index_dataset("mvtec", tile_products) if sample.anomalous]
    preprocess = Preprocess(SIDE, SIDE, IMAGENET_MEAN, IMAGENET_STD)
    change = Perturbation.draw(3, 1)
    item = PerturbedImages(samples, preprocess, 3)[1]
    with Image.open(samples[1].image) as photo:
        plain = preprocess.pixels(photo).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(item["image"] * std + mean, change.picture(plain), rtol=0, atol=1e-5)
    # The disc is dark: where the mask says it is, the changed picture is darker than beside it.
    dark = (item["image"] * std + mean).mean(0)
    assert item["mask"].any()
    assert dark[item["mask"]].mean() < 0.5 * dark[~item["mask"]].mean()
    gray = change.picture(torch.full((3, SIDE, SIDE), 0.5))
    np.testing.assert_allclose(gray.numpy(), 0.5 * change.brightness, atol=1e-5)
