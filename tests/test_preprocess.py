"""Reading every kind of photograph, transforming it, and the two views."""

import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, TiffImagePlugin
from torchvision import transforms
from torchvision.transforms.v2 import functional as tv

from adpretrain.photographs import depth, examine_mask, full_scale_of, page_count, picture_size, read_image, read_mask
from adpretrain.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, TwoViews, crop_side, gaussian_blur


def gradient(height: int = 24, width: int = 32) -> np.ndarray:
    """An RGB picture whose corners are all different."""
    ys, xs = np.mgrid[:height, :width]
    return np.stack([ys * 255 // (height - 1), xs * 255 // (width - 1), np.full_like(xs, 90)], -1).astype(np.uint8)


def png(path: Path, header: tuple[int, int, int, int], rows: bytes) -> Path:
    """A PNG written byte by byte: (width, height, bit depth, colour type) and its unfiltered rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


def test_rgb_is_read_as_it_is(tmp_path: Path) -> None:
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), gradient())


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_gray_keeps_its_brightness(tmp_path: Path, suffix: str) -> None:
    """65535 is white and 0 is black in every file: two files of different ranges stay comparable."""
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    for name, array in (("full", values), ("dark", values // 4)):
        Image.fromarray(array).save(tmp_path / f"{name}.{suffix}")
    full, dark = (np.asarray(read_image(tmp_path / f"{name}.{suffix}")) for name in ("full", "dark"))
    assert np.array_equal(full, np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2))
    assert dark.max() == 64
    assert abs(dark.astype(float) - full / 4).max() <= 0.5


def test_16_bit_colour(tmp_path: Path) -> None:
    pixels = gradient(4, 5).astype(">u2") * 257
    path = png(tmp_path / "a.png", (5, 4, 16, 2), b"".join(b"\0" + row.tobytes() for row in pixels))
    assert np.array_equal(np.asarray(read_image(path)), gradient(4, 5))


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_float_tiff_by_its_type_s_range(tmp_path: Path, top: float) -> None:
    values = np.linspace(0, top, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "a.tif")
    expected = np.rint(np.linspace(0, 255, 64)).reshape(8, 8)
    assert abs(np.asarray(read_image(tmp_path / "a.tif"))[..., 0] - expected).max() <= 1


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_other_modes_look_the_same_in_rgb(tmp_path: Path, mode: str) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, 4:] = 255
    suffix = "tif" if mode == "CMYK" else "png"
    Image.fromarray(pixels).convert(mode).save(tmp_path / f"a.{suffix}")
    assert np.array_equal(np.asarray(read_image(tmp_path / f"a.{suffix}")), pixels)


def test_transparency_is_white(tmp_path: Path) -> None:
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[:, 0] = (200, 100, 0, 255)  # opaque
    rgba[:, 1] = (200, 100, 0, 0)  # gone
    rgba[:, 2] = (200, 100, 0, 128)  # half
    Image.fromarray(rgba).save(tmp_path / "a.png")
    row = np.asarray(read_image(tmp_path / "a.png"))[0].astype(int)
    assert row[:2].tolist() == [[200, 100, 0], [255, 255, 255]]
    assert abs(row[2] - (np.array([200, 100, 0]) * 128 + 255 * 127) / 255).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png", transparency=0)
    assert np.asarray(read_image(tmp_path / "p.png"))[0].tolist() == [[255] * 3, [9] * 3]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    """Every camera orientation of one scene gives the same upright picture."""
    upright = Image.fromarray(gradient())
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), gradient())


def _truncated(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-2000])


def _bomb(path: Path) -> None:
    png(path, (40_000, 40_000, 8, 0), b"")  # 1.6 gigapixels in 60 bytes


BAD_FILES: dict[str, Callable[[Path], object]] = {
    "truncated.png": _truncated,
    "truncated.jpg": _truncated,
    "bomb.png": _bomb,
    "text.png": lambda path: path.write_text("not a picture"),
    "empty.jpg": lambda path: path.touch(),
    "folder.png": lambda path: path.mkdir(),
    "missing.png": lambda path: None,
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("read", [read_image, read_mask])
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, read: Callable[[Path], Image.Image]) -> None:
    BAD_FILES[name](tmp_path / name)
    reason = "image not found" if name == "missing.png" else "cannot read image"
    with pytest.raises(ValueError, match=rf"{reason}.*{name}"):
        read(tmp_path / name)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "I;16"])
@pytest.mark.parametrize("mark", [1, 255])
def test_a_mask_is_what_is_not_black_in_any_mode(tmp_path: Path, mode: str, mark: int) -> None:
    defect = np.zeros((6, 8), bool)
    defect[1:3, 2:7] = True
    if mode == "P":  # an optimiser may give index 0 to any colour
        mask = Image.fromarray(1 - defect.astype(np.uint8)).convert("P")
        mask.putpalette([mark, 0, 0, 0, 0, 0])
    elif mode == "I;16":
        mask = Image.fromarray(defect.astype(np.uint16) * mark)
    else:
        mask = Image.fromarray(defect.astype(np.uint8) * (255 if mode == "1" else mark)).convert(mode)
    mask.save(tmp_path / "m.png")
    assert Image.open(tmp_path / "m.png").mode == mode
    read = read_mask(tmp_path / "m.png")
    assert read.mode == "L"
    assert np.array_equal(np.asarray(read), defect * 255)


@pytest.mark.parametrize("name", ["m.jpg", "m.webp"])
def test_a_lossy_mask_keeps_its_shape(tmp_path: Path, name: str) -> None:
    """Though nearly black pixels around the defect are above zero (in a JPEG, hundreds)."""
    defect = np.zeros((64, 64), bool)
    defect[20:31, 30:43] = True
    Image.fromarray(defect.astype(np.uint8) * 255).save(tmp_path / name, quality=30)
    with Image.open(tmp_path / name) as stored:
        assert (np.asarray(stored.convert("L")) > 0).sum() > defect.sum()
    read, remark = examine_mask(tmp_path / name)
    assert np.array_equal(np.asarray(read), defect * 255)
    assert "lossy" in remark


@pytest.mark.parametrize("mark", [(255, 0, 0), (0, 0, 0), (255, 255, 255)])
@pytest.mark.parametrize("around", [(255, 255, 255), (0, 0, 0)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_mask_painted_on_a_transparent_layer(
    tmp_path: Path, mark: tuple[int, int, int], around: tuple[int, int, int], mode: str
) -> None:
    """Whatever colours lie there: if they are alike, the paint is the mask, and else what is not black."""
    defect = np.zeros((6, 8), bool)
    defect[1:3, 2:7] = True
    if mode == "P":
        layer = Image.fromarray(defect.astype(np.uint8)).convert("P")
        layer.putpalette([*around, *mark])
        layer.save(tmp_path / "m.png", transparency=0)
    else:
        colours = np.where(defect[..., None], mark, around).astype(np.uint8)
        layer = Image.fromarray(np.dstack([colours, defect.astype(np.uint8) * 255]))
        layer.convert(mode).save(tmp_path / "m.png")
    read, remark = examine_mask(tmp_path / "m.png")
    inverted = mark == (0, 0, 0) and around == (255, 255, 255)  # black paint beside white: the colours say it
    assert np.array_equal(np.asarray(read) > 0, ~defect if inverted else defect)
    told = (sum(mark) > 0 and sum(around) > 0) or sum(mark) == sum(around) == 0
    assert bool(remark) == told


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


def test_a_jpeg_is_decoded_as_small_as_is_enough(tmp_path: Path) -> None:
    """1024 x 800 at 1/2 for 300 and at 1/4 for 200; within a few levels of the whole file, resized."""
    path, photo = tmp_path / "photo.jpg", Image.fromarray(gradient(800, 1024))
    photo.save(path, quality=95)
    whole = read_image(path)
    for side, size in ((200, (256, 200)), (201, (512, 400)), (401, (1024, 800)), (2000, (1024, 800))):
        reduced = read_image(path, side)
        assert reduced.size == size
        preprocess = Preprocess(image_size=64)
        assert (preprocess(reduced) - preprocess(whole)).abs().max() * 255 <= 3
    photo.save(tmp_path / "photo.png")
    assert read_image(tmp_path / "photo.png", 200).size == (1024, 800)  # other formats have no smaller sizes


@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_the_size_in_the_header_is_that_of_the_upright_picture(tmp_path: Path, turn: int) -> None:
    exif = Image.Exif()
    exif[274] = turn
    Image.fromarray(gradient(40, 60)).save(tmp_path / "photo.jpg", exif=exif)
    assert picture_size(tmp_path / "photo.jpg") == read_image(tmp_path / "photo.jpg").size
    with pytest.raises(ValueError, match="image not found"):
        picture_size(tmp_path / "absent.jpg")


def test_pages_are_read_by_number_and_never_the_first_alone(tmp_path: Path) -> None:
    """Frames of every format that has them; a TIFF's smaller copy of a page and a JPEG's preview are no pages."""
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 100, 200)]
    for name in ("a.tif", "a.gif", "a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert page_count(tmp_path / name) == 3
        values = [int(np.asarray(read_image(tmp_path / name, page=page)).mean()) for page in (1, 2, 3)]
        assert values == [10, 100, 200]
        with pytest.raises(ValueError, match=r"a\..*holds 3 pages or frames: save each as a file"):
            read_image(tmp_path / name)
        with pytest.raises(ValueError, match="there is no page 4; it holds 3"):
            read_image(tmp_path / name, page=4)
    small = TiffImagePlugin.ImageFileDirectory_v2()
    small[254] = 1
    with TiffImagePlugin.AppendingTiffWriter(str(tmp_path / "thumb.tif"), new=True) as file:
        frames[1].save(file, format="TIFF")
        file.newFrame()
        frames[2].resize((4, 4)).save(file, format="TIFF", tiffinfo=small)
    frames[1].save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=frames[2:])
    for name in ("thumb.tif", "phone.jpg"):
        assert page_count(tmp_path / name) == 1
        assert np.asarray(read_image(tmp_path / name)).mean() == 100


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], None),
        ([(200.0, False)], 255.0),
        ([(200.0, False), (700.0, False)], 1023.0),
        ([(4095.0, False)], 4095.0),
        ([(4096.0, False)], 16383.0),
        ([(1.02, True)], 1.0),
        ([(251.0, True)], 255.0),
    ],
)
def test_the_full_scale_is_the_smallest_that_holds_all(
    values: list[tuple[float, bool]], expected: float | None
) -> None:
    assert full_scale_of([None, *values]) == expected
    with pytest.raises(ValueError, match="some photographs hold floats and others integers"):
        full_scale_of([(1.0, True), (9.0, False)])
    with pytest.raises(ValueError, match=r"up to 70000 exceed 16 bits"):
        full_scale_of([(70000.0, False)])


def test_a_given_full_scale_becomes_white_and_more_is_saturated(tmp_path: Path) -> None:
    values = np.array([[0, 2048, 4095, 5000]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", full_scale=4095)
    assert np.asarray(image)[0, :, 0].tolist() == [0, 128, 255, 255]
    assert image.info["saturated"] is True
    assert depth(tmp_path / "a.png") == (5000.0, False)
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "b.png")
    assert depth(tmp_path / "b.png") is None
