"""Pictures of any kind are read as 8-bit RGB, or refused in a sentence that names the file; nothing hangs or runs."""

from __future__ import annotations

import io
import os
import resource
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bounded import bounded
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from adpretrain.data.samples import ImageDataset, Sample
from adpretrain.photographs import FORMATS, picture_size, read_image, read_mask
from adpretrain.preprocess import LARGEST_SIDE, Preprocess
from downstream.cli import main
from downstream.inspection.photos import Photo, PhotoReader, Unreadable, find_images
from downstream.web.uploads import LIMITS, Upload, read_upload

MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "I;16",
    "F",
)
SUFFIXES = {"BMP": ".bmp", "GIF": ".gif", "JPEG": ".jpg", "PNG": ".png", "PPM": ".ppm", "TIFF": ".tif", "WEBP": ".webp"}
PREPROCESS = Preprocess(16)


def drawn(mode: str, width: int, height: int, seed: int) -> Image.Image:
    """A random picture of any of Pillow's modes."""
    rng = np.random.default_rng(seed)
    if mode == "F":
        return Image.fromarray(rng.normal(0.5, 0.4, (height, width)).astype(np.float32))
    if mode.startswith("I"):
        values = rng.integers(0, 65536, (height, width))
        return Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.int32))
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, (width, height), rng.bytes(width * height * bands)[: _length(mode, width, height)])


def _length(mode: str, width: int, height: int) -> int:
    return len(Image.new(mode, (width, height)).tobytes())


def sentence_or_picture(path: Path, read: Callable[[Path], Image.Image] = read_image) -> str:
    """ "" for a picture that was read, else what was said; anything but a ValueError naming the file fails the test."""
    picture, said = Image.new("L", (1, 1)), ""
    try:
        picture = read(path)
    except ValueError as error:
        said = str(error)
    assert not said or str(path) in said
    assert picture.mode in ("RGB", "L")
    assert PREPROCESS(picture.convert("RGB")).isfinite().all()
    return said


@bounded(150)
@given(
    mode=st.sampled_from(MODES),
    kind=st.sampled_from(sorted(SUFFIXES)),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    seed=st.integers(0, 99),
    orientation=st.integers(0, 9),
    transparent=st.booleans(),
)
def test_every_mode_and_format_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    mode: str,
    kind: str,
    width: int,
    height: int,
    seed: int,
    orientation: int,
    transparent: bool,
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"exif": exif} if kind in ("JPEG", "PNG", "TIFF", "WEBP") else {}
    if transparent and mode == "P" and kind in ("PNG", "GIF"):
        more["transparency"] = 3
    buffer = io.BytesIO()
    try:
        drawn(mode, width, height, seed).save(buffer, kind, **more)
    except (OSError, ValueError, KeyError):
        return  # the format has no such mode
    path = tmp_path_factory.getbasetemp() / f"any{SUFFIXES[kind]}"
    path.write_bytes(buffer.getvalue())
    assert sentence_or_picture(path) == "" or mode in ("LAB", "La", "RGBa", "HSV", "F")
    turned = 5 <= orientation <= 8 and bool(more)
    upright = (height, width) if turned else (width, height)
    assert picture_size(path) == upright
    if not sentence_or_picture(path):
        assert read_image(path).size == upright
    sentence_or_picture(path, read_mask)


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_as_a_png_is(tmp_path: Path, mode: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("tif", "png"):
        drawn(mode, 7, 4, 0).save(tmp_path / f"a.{kind}", exif=exif)
    ours, theirs = (np.asarray(read_image(tmp_path / f"a.{kind}")) for kind in ("tif", "png"))
    np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def whole() -> dict[str, bytes]:
    """The bytes of a small picture in every format."""
    found = {}
    for kind in SUFFIXES:
        buffer = io.BytesIO()
        drawn("RGB", 24, 20, 1).save(buffer, kind)
        found[kind] = buffer.getvalue()
    return found


def mutated(content: bytes, seed: int, how: str) -> bytes:
    """The bytes cut off, flipped, overwritten with large numbers, doubled or mixed up."""
    rng = np.random.default_rng(seed)
    data = bytearray(content)
    at = int(rng.integers(0, max(1, len(data))))
    if how == "cut":
        return bytes(data[:at])
    if how == "flip":
        for place in rng.integers(0, max(1, len(data)), 1 + seed % 8):
            data[place % max(1, len(data))] ^= int(rng.integers(1, 256))
    elif how == "huge":
        data[at : at + 4] = b"\xff\xff\xff\x7f"
    elif how == "zero":
        data[at : at + 16] = bytes(16)
    else:
        data[at:at] = data[max(0, at - 40) : at]
    return bytes(data)


HOW = st.sampled_from(["cut", "flip", "huge", "zero", "repeat"])


@bounded(250)
@given(kind=st.sampled_from(sorted(SUFFIXES)), seed=st.integers(0, 10**6), how=HOW)
def test_damaged_pictures_are_read_or_refused(
    whole: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int, how: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"damaged{SUFFIXES[kind]}"
    path.write_bytes(mutated(whole[kind], seed, how))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sentence_or_picture(path)
    sentence_or_picture(path, read_mask)
    assert isinstance(read_upload(Upload(path, path.name), PhotoReader(PREPROCESS, 1), LIMITS), Photo | Unreadable)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 << 10  # KiB


def png_of(width: int, height: int) -> bytes:
    """A PNG of one colour and any size: a thousandth of the bytes that it decodes to."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    row = zlib.compress(b"\0" * (1 + 3 * width) * min(height, 64), 9)
    chunks += [(b"IDAT", row), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("size", [(40_000, 40_000), (2**31 - 1, 1), (1, 2**31 - 1), (0, 5), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(
        png_of(min(size[0], 10), 1).replace(struct.pack(">II", min(size[0], 10), 1), struct.pack(">II", *size))
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (read_image, read_mask):
        assert sentence_or_picture(path, read)
    assert isinstance(read_upload(Upload(path, "bomb.png"), PhotoReader(PREPROCESS, 1)), Unreadable)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.parametrize("size", [(30_000, 2), (1, 20_000)])
def test_very_long_pictures_are_read(tmp_path: Path, size: tuple[int, int]) -> None:
    drawn("RGB", *size, 0).save(tmp_path / "long.png")
    (photo,) = next(PhotoReader(PREPROCESS, 1).batches([tmp_path / "long.png"]))
    assert isinstance(photo, Photo)


def test_numbers_that_are_no_picture(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tif")
    assert "NaN" in sentence_or_picture(tmp_path / "nan.tif")
    Image.fromarray(np.full((4, 4), np.inf, np.float32)).save(tmp_path / "inf.tif")
    assert sentence_or_picture(tmp_path / "inf.tif") == ""  # as bright as can be


def test_sixteen_bits_become_eight_exactly() -> None:
    from adpretrain.photographs import as_rgb

    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values.astype(np.float64) * 255 / 65535).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(as_rgb(Image.fromarray(values)))[..., 0], expected)


def test_postscript_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives EPS to Ghostscript, a program with a history; the name of the file says nothing about its kind."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (bin_ / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    path = tmp_path / "photo.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    assert "not a picture of a known kind" in sentence_or_picture(path)
    assert not (tmp_path / "ran").exists()
    assert "EPS" not in FORMATS


def awkward(folder: Path) -> list[str]:
    """Everything that can stand where a photograph is expected, and would be waited for or followed; their names."""
    (folder / "folder.png").mkdir()
    (folder / "inner").mkdir()
    (folder / "empty.png").touch()
    os.mkfifo(folder / "pipe.png")
    (folder / "zeros.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "inner" / "up").symlink_to(folder)
    return ["folder.png", "pipe.png", "zeros.png", "loop.png", "gone.png", "empty.png"]


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    said: dict[str, str] = {}
    names = awkward(tmp_path)

    def read_all() -> None:
        for name in names:
            said[name] = sentence_or_picture(tmp_path / name)
            sample = Sample(tmp_path / name, None, "c", "good", None, "test")
            with pytest.raises(ValueError, match=name):
                ImageDataset([sample], PREPROCESS)[0]

    reader = threading.Thread(target=read_all, daemon=True)
    reader.start()
    reader.join(20)
    assert not reader.is_alive()
    assert list(said) == names
    assert all(said.values())
    assert "it is not a file" in said["pipe.png"]
    drawn("RGB", 20, 20, 0).save(tmp_path / "good.png")
    assert [path.name for path in find_images(tmp_path)] == ["empty.png", "good.png"]


def test_a_command_meets_them_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`adpretrain check-data` and `adpretrain score` on folders of such things."""
    for place in ("mvtec/bolt/train/good", "mvtec/bolt/test/good", "line", "shots"):
        (tmp_path / place).mkdir(parents=True)
        for number in range(3):
            drawn("RGB", 30, 20, number).save(tmp_path / place / f"{number}.png")
    awkward(tmp_path / "mvtec/bolt/test/good")
    awkward(tmp_path / "line")
    (tmp_path / "line/secret.png").symlink_to("/etc/hostname")
    before = sorted(path for path in tmp_path.rglob("*") if "out" not in path.parts)
    assert main(["check-data", "--root", str(tmp_path / "mvtec")]) == 1
    where = [f"--normal={tmp_path}/shots", f"--images={tmp_path}/line", f"--out={tmp_path}/out"]
    assert main(["score", *where, "--threshold=1e9", "--device=cpu"]) == 3
    told = capsys.readouterr()
    assert "Traceback" not in told.err + told.out
    assert "pipe.png" in told.out + told.err
    assert sorted(path for path in tmp_path.rglob("*") if "out" not in path.parts) == before


def test_a_network_has_a_largest_side() -> None:
    for side in (0, LARGEST_SIDE + 1, 10**9, -1):
        with pytest.raises(ValueError, match="image_size"):
            Preprocess(side)
    for mean, std in (((float("nan"), 0, 0), (1, 1, 1)), ((0, 0, 0), (1, 0, 1)), ((0, 0, 0), (1, float("inf"), 1))):
        with pytest.raises(ValueError, match="must be finite, std"):
            Preprocess(mean=mean, std=std)


def test_no_photograph_is_passed_over_because_of_its_name(tmp_path: Path) -> None:
    """Every kind that is read has its suffixes; of what a telephone writes it is said that it cannot be read."""
    kinds = {".jfif": "JPEG", ".jpe": "JPEG", ".JP2": "JPEG2000", ".gif": "GIF", ".ppm": "PPM", ".pgm": "PPM"}
    for suffix, kind in kinds.items():
        Image.new("L" if suffix == ".pgm" else "RGB", (8, 8)).save(tmp_path / f"photo{suffix}", kind)
    for suffix in (".heic", ".HEIF", ".avif"):
        (tmp_path / f"phone{suffix}").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    (tmp_path / "notes.txt").write_text("no photograph")
    (found,) = PhotoReader(Preprocess(image_size=8), 16).batches(find_images(tmp_path))
    read = {item.path.name for item in found if isinstance(item, Photo)}
    lost = {item.path.name: item.reason for item in found if isinstance(item, Unreadable)}
    assert read == {f"photo{suffix}" for suffix in kinds}
    assert lost.keys() == {"phone.heic", "phone.HEIF", "phone.avif"}
    assert all("not a picture of a known kind (BMP, GIF, JPEG" in reason for reason in lost.values())
