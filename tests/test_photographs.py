"""Reading every kind of photograph and mask."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from adpretrain.photographs import depth, examine_mask, full_scale_of, page_count, picture_size, read_image, read_mask
from adpretrain.preprocess import Preprocess


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
