"""Transforming photographs, and the two views."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms
from torchvision.transforms.v2 import functional as tv

from adpretrain.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, TwoViews, crop_side, gaussian_blur


def gradient(height: int = 24, width: int = 32) -> np.ndarray:
    """An RGB picture whose corners are all different."""
    ys, xs = np.mgrid[:height, :width]
    return np.stack([ys * 255 // (height - 1), xs * 255 // (width - 1), np.full_like(xs, 90)], -1).astype(np.uint8)


def test_the_tensor_is_the_normalised_picture() -> None:
    preprocess = Preprocess(image_size=32, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = (pixels / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    tensor = preprocess(Image.fromarray(pixels))
    assert tensor.dtype == torch.float32
    np.testing.assert_allclose(tensor.numpy(), expected.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "HSV", "I;16", "F"])
def test_a_picture_of_any_mode_is_its_rgb(mode: str) -> None:
    """A palette's indices, hues or gray values of 0 to 255 would be taken for colours."""
    gray = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8))
    colour = Image.merge("RGB", [gray, gray.rotate(90), gray.rotate(180)])
    picture = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257) if mode == "I;16" else None
    picture = picture or (gray if mode in ("L", "F") else colour).convert(mode)
    preprocess = Preprocess(image_size=32, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    expected = preprocess(gray.convert("RGB") if mode in ("L", "F", "I;16") else picture.convert("RGB"))
    assert torch.equal(preprocess(picture), expected)


def test_what_is_no_picture_is_refused() -> None:
    for wrong in ("good.png", np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8), [Image.new("RGB", (8, 8))]):
        with pytest.raises(ValueError, match=rf"got {type(wrong).__name__}: read a file with .*read_image"):
            Preprocess()(wrong)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resizing_is_torchs_antialiased_interpolation(interpolation: str) -> None:
    smooth = gradient(120, 200)
    preprocess = Preprocess(image_size=48, interpolation=interpolation)
    reference = torch.from_numpy(smooth).permute(2, 0, 1)[None].double()
    reference = F.interpolate(reference, size=(48, 48), mode=interpolation, antialias=True, align_corners=False)
    assert (preprocess(Image.fromarray(smooth)) * 255 - reference[0]).abs().max() <= 1.0


def test_the_crop_is_the_centre_and_the_view_is_what_the_network_sees() -> None:
    picture = Image.fromarray(gradient(64, 64))
    cropped = Preprocess(image_size=32, crop_from=64)
    assert np.array_equal(np.asarray(cropped.view_of(picture)), gradient(64, 64)[16:48, 16:48])
    assert torch.equal(cropped(picture), Preprocess(image_size=32)(cropped.view_of(picture)))


def test_masks_are_resized_by_nearest_neighbour_with_the_image_s_geometry() -> None:
    mask = np.zeros((100, 60), np.uint8)
    mask[37:62, 20:41] = 255
    out = Preprocess(image_size=30, crop_from=50).mask(Image.fromarray(mask))  # resized to 83 x 50
    assert out.dtype == torch.bool
    rows = [int((y + 26 + 0.5) * 100 / 83) for y in range(30)]
    columns = [int((x + 10 + 0.5) * 60 / 50) for x in range(30)]
    assert np.array_equal(out.numpy(), mask[np.ix_(rows, columns)] > 0)


@pytest.mark.parametrize("size", [(640, 480), (481, 643), (1000, 251), (37, 90), (3, 2), (1, 1), (256, 256), (1, 19)])
@pytest.mark.parametrize(("image_size", "crop_from"), [(224, 256), (63, 64), (50, 50)])
def test_a_crop_is_torchvisions_resize_and_centre_crop(size: tuple[int, int], image_size: int, crop_from: int) -> None:
    """What the authors' released code does to photographs, to the last bit."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    mask = Image.fromarray(((rng.random((size[1], size[0])) < 0.3) * 255).astype(np.uint8))

    def theirs(picture: Image.Image, mode: transforms.InterpolationMode) -> np.ndarray:
        steps = [transforms.Resize(crop_from, mode), transforms.CenterCrop(image_size)]
        return np.asarray(transforms.Compose(steps)(picture))

    preprocess = Preprocess(image_size, crop_from)
    expected = theirs(photo, transforms.InterpolationMode.BICUBIC)
    assert np.array_equal(preprocess.pixels(photo).permute(1, 2, 0).numpy(), expected)
    assert np.array_equal(np.asarray(preprocess.view_of(photo)), expected)
    assert np.array_equal(preprocess.mask(mask).numpy(), theirs(mask, transforms.InterpolationMode.NEAREST) > 0)


def test_a_photograph_too_thin_to_be_cropped_is_refused() -> None:
    """1 x 60000 pixels would become 224 x 13 million before the crop; a squeeze takes them as they are."""
    thin = Image.new("RGB", (1, 60_000))
    with pytest.raises(ValueError, match=r"1x60000 pixels is too thin .* squeeze"):
        Preprocess(224, 256).pixels(thin)
    assert Preprocess(32).pixels(thin).shape == (3, 32, 32)


def test_what_a_configuration_asks_for() -> None:
    released = [(crop_side(size, "crop"), crop_side(size)) for size in (224, 320, 480)]
    assert released == [(256, None), (366, None), (512, None)]
    assert crop_side(224, "crop", 240) == 240
    for arguments, message in (
        ((300, "crop"), r"'crop' to 300 pixels needs crop_from.*224 from 256, 320 from 366, 480 from 512"),
        ((224, "squeeze", 256), "crop_from 256 goes with resize 'crop'"),
        ((224, "fill"), r"resize 'fill' is unknown; choose one of \('squeeze', 'crop'\)"),
    ):
        with pytest.raises(ValueError, match=message):
            crop_side(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interpolation": "lanczos"}, "'lanczos' is unknown"),
        ({"image_size": 256, "crop_from": 224}, r"image_size 256 must be in 1\.\.crop_from \(224\)"),
        ({"image_size": 224, "crop_from": 5000}, "no side above 4096"),
        ({"image_size": 0}, "image_size 0"),
        ({"std": (1.0, 0.0, 1.0)}, "must be positive"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(**arguments)


def test_a_preprocess_survives_json_lists() -> None:
    assert Preprocess(mean=[0.1, 0.2, 0.3], std=[1, 1, 1]) == Preprocess(mean=(0.1, 0.2, 0.3))
    assert Preprocess(**Preprocess(image_size=64, crop_from=80).to_dict()) == Preprocess(image_size=64, crop_from=80)


def photograph() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(60, 200, (64, 64, 3), dtype=np.uint8))


def test_views_depend_on_the_seed_alone() -> None:
    two_views = TwoViews(Preprocess(image_size=32))
    first = two_views(photograph(), seed=7)
    torch.rand(5)
    assert first.shape == (2, 3, 32, 32)
    assert torch.equal(two_views(photograph(), seed=7), first)
    assert not torch.equal(two_views(photograph(), seed=8), first)
    assert not torch.equal(first[0], first[1])


def test_views_leave_every_global_generator_alone() -> None:
    def draws() -> tuple[object, ...]:
        return torch.rand(3).tolist(), np.random.random(3).tolist(), random.random()  # noqa: NPY002

    def seed_all() -> None:
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        random.seed(1)

    seed_all()
    expected = draws()
    seed_all()
    TwoViews(Preprocess(image_size=32))(photograph(), seed=3)
    assert draws() == expected
    assert torch.initial_seed() == 1


def test_views_have_the_released_probabilities_and_geometry() -> None:
    """Of 240 views about 20 % are gray and 8 % untouched; the brightest square never moves."""
    pixels = np.full((32, 32, 3), (80, 60, 40), np.uint8)
    pixels[20:28, 4:12] = (240, 230, 200)
    picture, preprocess = Image.fromarray(pixels), Preprocess(image_size=32)
    views = torch.cat([TwoViews(preprocess)(picture, seed) for seed in range(120)])
    gray = (views[:, 0] == views[:, 1]).flatten(1).all(1) & (views[:, 1] == views[:, 2]).flatten(1).all(1)
    plain = (views == preprocess.pixels(picture)).flatten(1).all(1)
    for share, expected in ((gray, 0.2), (plain, 0.2 * 0.8 * 0.5)):
        assert abs(share.float().mean().item() - expected) < 4 * (expected * (1 - expected) / 240) ** 0.5
    light = views.float().mean(1)
    inside, outside = light[:, 22:26, 6:10].mean((1, 2)), light[:, 4:12, 20:28].mean((1, 2))
    assert (inside > outside).all()


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("sigma", [0.1, 0.9, 2.0])
def test_blurring_is_torchvisions_to_one_level(side: int, sigma: float) -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8))
    size = 3 if side == 32 else 23
    expected = tv.gaussian_blur(pixels, [size, size], [sigma, sigma])
    difference = (gaussian_blur(pixels, size, sigma).int() - expected.int()).abs()
    assert difference.max() <= 1  # rounding
    assert (difference > 0).float().mean() < 1e-3
