"""Files from strangers: what is refused, and what their names become."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from adpretrain.photographs import read_image
from adpretrain.preprocess import Preprocess
from downstream.inspection.photos import Photo, PhotoReader, Unreadable
from downstream.web.uploads import Limits, Upload, check_counts, clean_name, read_upload, uploads

SMALL = Limits(good=2, new=3, file_bytes=100_000, pixels=10_000)
SIZE = PhotoReader(Preprocess(image_size=32), 1)


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that says it is huge, with rows of zeros as far as they fit."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width // 8 + 1) * min(height, 64)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def encoded(kind: str, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 120).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"just some text", "not a photograph"),
        (b"", "not a photograph"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a photograph"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not a photograph"),  # would run Ghostscript
        (encoded("GIF", mode="L"), "not a photograph"),  # known to Pillow, not allowed here
        (encoded("PPM"), "not a photograph"),
        (png_bomb(60_000, 60_000), "far too large"),  # beyond Pillow's own limit
        (png_bomb(9_000, 9_000), "81 megapixels"),  # below it
        (encoded("BMP", (300, 300)), "MB"),  # 270 kB
        (encoded("PNG", (101, 100)), "101 x 100"),
        (encoded("PNG")[:-30], "damaged or cut off"),
    ],
)
def test_what_is_not_a_small_photograph_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "renamed.png"
    path.write_bytes(content)
    found = read_upload(Upload(path, "renamed.png"), SIZE, SMALL)
    assert isinstance(found, Unreadable)
    assert reason in found.reason
    assert str(tmp_path) not in found.reason
    assert str(found.path) == "renamed.png"


@pytest.mark.parametrize("kind", ["BMP", "JPEG", "PNG", "TIFF", "WEBP"])
def test_the_content_decides_not_the_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(kind))
    found = read_upload(Upload(path, "photo.jpg"), SIZE, SMALL)
    assert isinstance(found, Photo)
    assert found.pixels.equal(SIZE.preprocess(read_image(path)))  # exactly as `adpretrain score` reads it
    assert found.aspect == pytest.approx(40 / 30)


def test_the_page_shows_and_scores_upright_photographs(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (40, 30), (200, 0, 0, 128))
    picture.save(tmp_path / "alpha.png")
    turned = Image.new("RGB", (40, 30), (10, 20, 30))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    for name, aspect in (("alpha.png", 40 / 30), ("turned.jpg", 30 / 40)):
        found = read_upload(Upload(tmp_path / name, name), SIZE, SMALL)
        assert isinstance(found, Photo)
        assert found.pixels.equal(SIZE.preprocess(read_image(tmp_path / name)))
        assert found.aspect == pytest.approx(aspect)


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("part 7.JPG", "part 7.JPG"),
        ("Größe_µ.png", "Größe_µ.png"),
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("..", "photograph"),
        ("", "photograph"),
        (".hidden.png", "hidden.png"),
        ("<script>alert(1)</script>.png", "script-.png"),
        ("a<script>alert(1)<.png", "a-script-alert(1)-.png"),
        ('" onerror="x.png', "onerror=-x.png"),
        ("=HYPERLINK(1).png", "HYPERLINK(1).png"),  # a formula in a table of a spreadsheet
        ("gnp.\u202eexe.png", "gnp.exe.png"),  # would be shown reversed
        ("line\nbreak\x00.png", "linebreak.png"),
        ("x" * 300 + ".png", "x" * 76 + ".png"),
    ],
)
def test_names_are_cleaned(name: str, clean: str) -> None:
    assert clean_name(name) == clean


def test_names_become_distinct() -> None:
    names = [upload.name for upload in uploads(["/u/1/a.png", "/u/2/a.png", "/u/3/A.PNG", "/u/4/b", "/u/5/b"])]
    assert names == ["a.png", "a-2.png", "A-3.PNG", "b", "b-2"]


@pytest.mark.parametrize(
    ("good", "new", "message"),
    [(0, 1, "First drop 1 to 2"), (1, 0, "Drop the photographs"), (3, 1, "3 good"), (1, 4, "4 new")],
)
def test_counts_are_limited(good: int, new: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_counts([0] * good, [0] * new, SMALL)
    check_counts([0] * 2, [0] * 3, SMALL)


def test_a_file_of_several_pages_is_refused(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (10, 200)]
    pages[0].save(tmp_path / "two.tif", save_all=True, append_images=pages[1:])
    found = read_upload(Upload(tmp_path / "two.tif", "two.tif"), SIZE)
    assert isinstance(found, Unreadable)
    assert "holds 2 pages or frames" in found.reason
