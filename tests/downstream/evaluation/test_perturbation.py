"""Changed images against torchvision's own transforms, Pillow and physics, and masks that move with them."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as V

from adpretrain.data import Sample, index_dataset
from adpretrain.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from downstream.evaluation.perturbations import (
    ANGLE,
    BLUR,
    KINDS,
    LIGHT,
    NOISE,
    PAPER,
    QUALITY,
    SETTINGS,
    SHIFT,
    Change,
    Perturbation,
)
from downstream.evaluation.trial import Images, PhotographCache, Settings

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


def test_a_quarter_turn_moves_a_known_pixel_and_its_mask() -> None:
    """Counter-clockwise: what is at the right edge goes to the top; then a shift by 3 pixels right and 2 down."""
    picture, mask = torch.zeros(3, SIDE, SIDE), torch.zeros(SIDE, SIDE, dtype=torch.bool)
    picture[:, 10, 50], mask[10, 50] = 1.0, True
    change = Perturbation(90.0, (3 / SIDE, 2 / SIDE))
    row, column = SIDE - 1 - 50 + 2, 10 + 3
    moved = change.picture(picture)
    assert moved[:, row, column] == pytest.approx(1.0, abs=1e-3)
    assert moved.sum() == pytest.approx(3.0, abs=1e-2)
    assert change.mask(mask).nonzero().tolist() == [[row, column]]


def test_noise_has_the_stated_deviation_and_no_mean() -> None:
    """On mid gray, where nothing is cut off: 3 * 256^2 values, so that the deviation is known to 0.2 %."""
    gray = torch.full((3, 256, 256), 0.5)
    for deviation in (NOISE[0], 0.025, NOISE[1]):
        grain = Perturbation(noise=deviation, grain=7).picture(gray) - 0.5
        assert float(grain.std()) == pytest.approx(deviation, rel=0.01)
        assert abs(float(grain.mean())) < 5 * deviation / math.sqrt(grain.numel())
    assert not torch.equal(grain, Perturbation(noise=deviation, grain=8).picture(gray) - 0.5)
    assert pytest.approx((1 / math.sqrt(10_000), 1 / math.sqrt(10_000 / 16))) == NOISE  # electrons at white


@pytest.mark.parametrize("quality", QUALITY)
def test_jpeg_is_pillows_round_trip(quality: int) -> None:
    pixels = (255 * smooth(2)).round().to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format="JPEG", quality=quality)
    expected = np.asarray(Image.open(file)).transpose(2, 0, 1)
    found = Perturbation(quality=quality).picture(pixels.float() / 255)
    np.testing.assert_array_equal((255 * found).round().numpy(), expected)
    assert not np.array_equal(expected, pixels.numpy())


def test_light_is_monotone() -> None:
    """A brighter photograph is nowhere darker; more contrast spreads its values."""
    picture = smooth(3)
    levels = [Perturbation(brightness=factor).picture(picture) for factor in (0.7, 0.9, 1.0, 1.1, 1.3)]
    assert all((brighter >= darker).all() for darker, brighter in itertools.pairwise(levels))
    spreads = [float(Perturbation(contrast=factor).picture(picture).std()) for factor in (0.7, 0.9, 1.1, 1.3)]
    assert spreads == sorted(set(spreads))


def test_no_amount_changes_nothing() -> None:
    picture, mask = smooth(4), smooth(4)[0] > 0.5
    torch.testing.assert_close(Perturbation().picture(picture), picture, rtol=0, atol=1e-6)
    assert torch.equal(Perturbation().mask(mask), mask)
    preprocess = Preprocess(SIDE, SIDE, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(Perturbation().network_input(picture, preprocess), picture, rtol=0, atol=1e-5)


def test_draws_cover_the_ranges_and_repeat() -> None:
    drawn = [Perturbation.draw(0, index, KINDS) for index in range(400)]
    for values, low, high in (
        ([change.angle for change in drawn], -ANGLE, ANGLE),
        ([change.shift[0] for change in drawn], -SHIFT, SHIFT),
        ([change.shift[1] for change in drawn], -SHIFT, SHIFT),
        ([change.brightness for change in drawn], 1 - LIGHT, 1 + LIGHT),
        ([change.contrast for change in drawn], 1 - LIGHT, 1 + LIGHT),
        ([change.sigma for change in drawn], *BLUR),
        ([change.noise for change in drawn], *NOISE),
        ([change.quality for change in drawn], *QUALITY),
    ):
        assert low <= min(values) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(values) <= high
    assert (ANGLE, SHIFT, LIGHT, BLUR) == (5.0, 0.01, 0.3, (0.1, 1.0))  # suppl. C.1
    assert Perturbation.draw(0, 7, KINDS) == drawn[7] != Perturbation.draw(1, 7, KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_drawn_alike_with_and_without_the_others(kind: str) -> None:
    """What a kind alone changes, it changes by the same amount when others are drawn too, before or after it."""
    plain, alone = Perturbation(), Perturbation.draw(5, 3, (kind,))
    own = [name for name, value in vars(plain).items() if vars(alone)[name] != value]
    assert own
    others = tuple(other for other in KINDS if other != kind)
    for kinds in ((kind, *others), (*others, kind), KINDS):
        every = Perturbation.draw(5, 3, kinds)
        assert {name: vars(every)[name] for name in own} == {name: vars(alone)[name] for name in own}
    without = Perturbation.draw(5, 3, others)
    assert all(vars(without)[name] == vars(plain)[name] for name in own)


def test_the_amounts_of_different_kinds_are_not_the_same_number() -> None:
    """Each kind has its own random numbers: over many images, angle and blur are not correlated."""
    drawn = [Perturbation.draw(0, index) for index in range(400)]
    angles, sigmas, lights = ([getattr(c, n) for c in drawn] for n in ("angle", "sigma", "brightness"))
    assert np.abs(np.corrcoef([angles, sigmas, lights])[np.triu_indices(3, 1)]).max() < 0.2  # 4 standard errors


def test_each_kind_is_a_setting_and_the_papers_together_are_one() -> None:
    assert list(SETTINGS) == [*KINDS, "light + rotation + shift + blur"]
    assert SETTINGS["light + rotation + shift + blur"] == PAPER
    assert Change(0, PAPER).said == (
        "the scored images were changed in brightness and contrast by up to 30%, turned by up to 5 degrees, shifted by "
        "up to 1% of the side and blurred with sigma 0.1 to 1 pixels"
    )
    assert Change(0, ("jpeg",)).said == "the scored images were compressed as JPEG of quality 25 to 75"


def test_items_are_changed_pictures_and_masks(tile_products: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read, changed in 0..1, normalised again; a photograph is read once for all changes, and kept as it is."""
    samples = [sample for sample in index_dataset("mvtec", tile_products) if sample.anomalous]
    preprocess = Preprocess(SIDE, SIDE, IMAGENET_MEAN, IMAGENET_STD)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    read: list[Path] = []
    original = Sample.read
    monkeypatch.setattr(Sample, "read", lambda self, side=None: (read.append(self.image), original(self, side))[1])
    settings = Settings(photographs=PhotographCache())
    for kinds in SETTINGS.values():
        change = Change(3, kinds).of(1)
        ((images, masks),) = Images(samples, preprocess, settings, Change(3, kinds)).with_masks()
        with Image.open(samples[1].image) as photo:
            plain = preprocess.pixels(photo).float() / 255
        seen = images[1] * std + mean
        torch.testing.assert_close(seen, change.picture(plain), rtol=0, atol=1.1 / 255 if change.quality else 1e-5)
        # The disc is dark: where the mask says it is, the changed picture is darker than beside it.
        dark, mask = seen.mean(0), torch.from_numpy(masks[1])
        assert mask.any()
        assert dark[mask].mean() < 0.5 * dark[~mask].mean()
    assert read == [sample.image for sample in samples]
    ((images, _),) = Images(samples, preprocess, settings).with_masks()
    torch.testing.assert_close(images[1] * std + mean, plain, rtol=0, atol=1e-5)
