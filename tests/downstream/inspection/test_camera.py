"""`inspector(image)`: every form of a photograph gives what its file gives, from any thread, and nothing is written."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import tile
from PIL import Image

from adpretrain.extractor import ADExtractor
from downstream.inspection import Options
from downstream.inspection.camera import Verdict
from downstream.inspection.inspector import Inspector
from downstream.inspection.run import score_folder
from downstream.inspection.set_up import inspector_from_folder
from downstream.tiles import Tiling

CPU = torch.device("cpu")
NUMBERS = ("score", "p_value", "verdict", "reason")


def numbers(verdict: Verdict) -> tuple[Any, ...]:
    return tuple(getattr(verdict, name) for name in NUMBERS)


def drawn(folder: Path, seeds: range, change: Callable[[Image.Image], Image.Image] = lambda image: image) -> Path:
    folder.mkdir()
    for seed in seeds:
        change(tile(seed)).save(folder / f"{seed}.png")
    return folder


@pytest.fixture(scope="module")
def inspector(extractor_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Inspector:
    normal = drawn(tmp_path_factory.mktemp("camera") / "normal", range(6))
    return inspector_from_folder(ADExtractor.from_pretrained(extractor_dir), CPU, normal)


def test_the_verdict_is_that_of_the_command(extractor_dir: Path, tmp_path: Path) -> None:
    normal, images = drawn(tmp_path / "normal", range(6)), drawn(tmp_path / "images", range(10, 13))
    tile(20, blob=True).save(images / "disc.png")
    (images / "broken.png").write_bytes(b"no picture")
    Image.new("RGB", (96, 96)).save(images / "dark.png")
    found = score_folder(extractor_dir, normal, images, tmp_path / "out", options=Options(batch_size=1), device="cpu")
    inspector = inspector_from_folder(ADExtractor.from_pretrained(extractor_dir), CPU, normal)
    for result in found.results:
        verdict = inspector(images / result.path)
        assert verdict.result.path == result.path
        assert numbers(verdict) == tuple(getattr(result, name) for name in NUMBERS)
    assert {result.verdict for result in found.results} == {"normal", "anomalous", "unreadable"}


def test_every_form_of_a_photograph_is_the_same(inspector: Inspector, tmp_path: Path) -> None:
    image = tile(20, blob=True)
    image.save(tmp_path / "a.png")
    rgb = np.asarray(image)
    expected = numbers(inspector(tmp_path / "a.png"))
    forms: list[Any] = [
        str(tmp_path / "a.png"),
        image,
        image.convert("RGBA"),
        rgb,
        np.dstack([rgb, np.full_like(rgb[..., 0], 255)]),
        rgb[::-1][::-1],
        rgb.astype(np.float64),
        (rgb / 255).astype(np.float32),
        rgb.astype(np.float16),
        rgb.astype(np.uint16) * 257,
        rgb.astype(">u2") * 257,
        torch.from_numpy(rgb.copy()).permute(2, 0, 1),
        torch.from_numpy(rgb / 255).permute(2, 0, 1),
        (torch.from_numpy(rgb.copy()).permute(2, 0, 1) / 255).requires_grad_(),
    ]
    for number, form in enumerate(forms):
        assert numbers(inspector(form)) == expected, number
    with Image.open(tmp_path / "a.png") as opened:
        assert numbers(inspector(opened)) == expected
    assert numbers(inspector(rgb[..., ::-1])) != expected  # OpenCV's order is not ours


def test_gray_photographs_are_the_same(inspector: Inspector, tmp_path: Path) -> None:
    gray = tile(20, blob=True).convert("L")
    values = np.asarray(gray)
    expected = numbers(inspector(gray.convert("RGB")))
    forms = [gray, values, values.astype(np.uint16) * 257, values / 255, values.astype(np.float32)]
    forms += [
        torch.from_numpy(values.copy()),
        torch.from_numpy(values / 255),
        gray.convert("I;16").point(lambda v: v * 257),
    ]
    for number, form in enumerate(forms):
        assert numbers(inspector(form)) == expected, number


def test_a_camera_of_12_bits_has_the_full_scale_of_its_normals(extractor_dir: Path, tmp_path: Path) -> None:
    def wide(image: Image.Image) -> Image.Image:
        return Image.fromarray((np.asarray(image.convert("L"), float) * 4095 / 255).round().astype(np.uint16))

    inspector = inspector_from_folder(
        ADExtractor.from_pretrained(extractor_dir), CPU, drawn(tmp_path / "normal", range(4), wide)
    )
    assert inspector.reader.full_scale == 4095
    part = wide(tile(20, blob=True))
    part.save(tmp_path / "part.png")
    assert numbers(inspector(np.asarray(part))) == numbers(inspector(tmp_path / "part.png"))
    assert inspector(np.asarray(part)).verdict == "anomalous"


def png_of_16_bits(values: np.ndarray[Any, Any]) -> bytes:
    """A colour file of 16 bits, which Pillow reads and cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colour_of_16_bits_is_what_its_file_is(inspector: Inspector, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3))
    values = (np.asarray(tile(11)).astype(int) * 256 + noise).astype(np.uint16)
    (tmp_path / "deep.png").write_bytes(png_of_16_bits(values))
    assert numbers(inspector(values)) == numbers(inspector(tmp_path / "deep.png"))


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (2, 3000), (641, 479)])
def test_any_size_has_a_verdict(inspector: Inspector, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    verdict = inspector(noise)
    assert verdict.verdict in ("anomalous", "unreadable")  # one pixel is blank
    for region in verdict.regions:
        left, top, right, bottom = region.box
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]


def test_what_cannot_be_scored_says_why_and_raises_nothing(inspector: Inspector, tmp_path: Path) -> None:
    tile(1).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    holes = np.asarray(tile(1)) / 255
    holes[3, 4] = np.nan
    with Image.open(tmp_path / "cut.png") as cut:
        for image, why in (
            (tmp_path / "nowhere.png", "not found"),
            (tmp_path / "cut.png", "cut.png"),
            (cut, "cannot read this image"),
            (np.zeros((96, 96, 3), np.uint8), "the photograph is blank"),
            (np.zeros((0, 96, 3), np.uint8), "no pixels"),
            (np.zeros((96, 0), np.float32), "no pixels"),
            (holes, "NaN"),
        ):
            verdict = inspector(image)
            assert (verdict.verdict, verdict.score, verdict.p_value) == ("unreadable", None, None)
            assert why in verdict.reason
            assert (verdict.regions, verdict.heatmap, verdict.panel()) == ((), None, None)
    assert inspector(np.full((96, 96), np.inf, np.float32)).verdict == "unreadable"


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (None, "type NoneType"),
        (7, "type int"),
        ([[1, 2], [3, 4]], "type list"),
        (np.zeros(5, np.uint8), r"shape \(5,\)"),
        (np.zeros((5, 5, 2), np.uint8), r"shape \(5, 5, 2\)"),
        (np.zeros((1, 5, 5, 3), np.uint8), r"shape \(1, 5, 5, 3\)"),
        (np.zeros((5, 5), np.int64), "int64 numbers"),
        (np.zeros((5, 5), bool), "bool numbers"),
        (np.zeros((5, 5), complex), "complex128 numbers"),
        (torch.zeros(5, 5, 3), r"shape \(5, 5, 3\)"),
        (torch.zeros(1, 3, 5, 5), r"shape \(1, 3, 5, 5\)"),
    ],
)
def test_what_is_no_photograph_is_a_mistake(inspector: Inspector, image: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named + ".*; expected a path, a PIL image, a numpy array"):
        inspector(image)


def test_eight_threads_say_what_one_says(inspector: Inspector) -> None:
    frames = [np.asarray(tile(seed, blob=seed % 3 == 0)) for seed in range(30, 46)] * 4
    alone = [numbers(inspector(frame)) for frame in frames]
    fresh = Inspector(**{field: getattr(inspector, field) for field in inspector.__dataclass_fields__})
    with ThreadPoolExecutor(8) as pool:  # nothing is cached in the second inspector yet
        assert [numbers(verdict) for verdict in pool.map(fresh, frames)] == alone
    assert len({verdict for _, _, verdict, _ in alone}) == 2


def test_the_disc_is_the_region_and_no_file_is_written(
    inspector: Inspector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    image = tile(20, blob=True, size=192)
    ys, xs = np.nonzero(np.asarray(image)[..., 0] == 10)
    verdict = inspector(image, name="disc")
    first = verdict.regions[0]
    left, top, right, bottom = first.box
    assert left <= xs.mean() < right
    assert top <= ys.mean() < bottom
    told = verdict.as_dict()
    assert told["path"] == "disc"
    assert told["regions"][0]["box"] == list(first.box)
    assert "heatmap" not in told
    assert verdict.heatmap is not None
    assert verdict.heatmap.size == (384, 384)
    assert verdict.heatmap is verdict.heatmap  # drawn once
    assert list(tmp_path.iterdir()) == []


def test_regions_are_calibrated_on_the_normal_maps(inspector: Inspector) -> None:
    """With 6 normals, the highest of their peaks promises 1 of 7; none of them has a region of its own above it."""
    peaks = [normal.peak for normal in inspector.normals]
    assert inspector.pixel_limit == max(peak for peak in peaks if peak is not None)


def test_one_normal_photograph_gives_a_score_alone(extractor_dir: Path, tmp_path: Path) -> None:
    normal = drawn(tmp_path / "normal", range(1))
    verdict = inspector_from_folder(ADExtractor.from_pretrained(extractor_dir), CPU, normal)(tile(20, blob=True))
    assert (verdict.verdict, verdict.p_value, verdict.regions) == ("undecided", None, ())
    assert verdict.score is not None
    assert verdict.heatmap is not None


def test_a_photograph_of_another_size_than_the_tiles_is_unreadable(extractor_dir: Path, tmp_path: Path) -> None:
    options = Options(tiling=Tiling(tile=64))
    normal = drawn(tmp_path / "normal", range(3))
    inspector = inspector_from_folder(ADExtractor.from_pretrained(extractor_dir), CPU, normal, options=options)
    assert inspector(tile(20, blob=True)).verdict == "anomalous"
    small = inspector(tile(20, size=80))
    assert small.verdict == "unreadable"
    assert "80x80 pixels" in small.reason
