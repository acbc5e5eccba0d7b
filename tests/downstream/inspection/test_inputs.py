"""`adpretrain score` given folders and files that are not what they seem: refused with the remedy, or told in the
report; never a silent 0."""

from __future__ import annotations

import csv
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from drawn import tile
from PIL import Image

from downstream.cli import main
from downstream.inspection.photos import find_images, passed_over

Write = Callable[..., Path]
FAULTS = Path(__file__).parents[4] / "shared" / "faults"


@pytest.fixture
def score(extractor_dir: Path, tmp_path: Path) -> Callable[..., int]:
    def run(normal: Path, images: Path, *more: str) -> int:
        folders = ["--normal", str(normal), "--images", str(images), "--out", str(tmp_path / "out")]
        return main(["score", "--extractor", str(extractor_dir), *folders, "--device", "cpu", *more])

    return run


def rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "scores.csv").open() as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def warnings_of(out: Path) -> str:
    return " ".join(json.loads((out / "summary.json").read_text())["warnings"])


def test_a_data_set_is_refused_with_the_folders_to_use(
    tile_products: Path, write_tiles: Write, score: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = write_tiles("plain", range(4))
    slab = tile_products / "slab"
    for normal, images in ((slab, plain), (plain, slab), (tile_products, plain)):
        assert score(normal, images) == 2
        said = capsys.readouterr().err
        assert f"use {slab}/train/good as --normal, {slab}/test as --images" in said
        assert "in the mvtec layout" in said
    assert score(slab / "train" / "good", slab / "test", "--false-alarm-rate", "0.2") == 1


def test_masks_beside_the_photographs_are_refused(tile_products: Path, tmp_path: Path) -> None:
    photo = tile_products / "slab/test/disc/000.png"
    mask = tile_products / "slab/ground_truth/disc/000_mask.png"
    for number, (name, mask_name, why) in enumerate(
        (
            ("a.png", "a_mask.png", "it is named after a"),
            ("a.png", "ground_truth/a.png", "it lies in a folder of masks"),
            ("a.jpg", "a.png", "it has two colours and the name of a.jpg"),
        )
    ):
        folder = tmp_path / str(number)
        (folder / mask_name).parent.mkdir(parents=True)
        Image.open(photo).save(folder / name)
        shutil.copy(mask, folder / mask_name)
        with pytest.raises(ValueError, match=f"masks beside the photographs, .*{why}.*photographs alone"):
            find_images(folder)
    Image.open(photo).save(tmp_path / "2" / "a.png")  # the same photograph in two formats
    assert len(find_images(tmp_path / "2")) == 2


@pytest.mark.skipif(not FAULTS.is_dir(), reason="shared/faults is not here")
def test_the_product_folder_among_the_faults_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tile part A/train/good as --normal, .*tile part A/test as --images"):
        find_images(FAULTS / "mvtec_root" / "tile part A")


def test_videos_and_raw_files_are_told_with_the_remedy(write_tiles: Write, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    for name in ("a.MP4", "b.mov", "c.NEF", "notes.txt"):
        (tmp_path / "clips" / name).write_bytes(b"\0" * 64)
    frames, export = r"ffmpeg -i clip\.mov frames/%06d\.png", r"raw files \(\.nef\) .* export them as TIFF or PNG"
    with pytest.raises(ValueError, match=rf"no images in .*Videos \(\.mov, \.mp4\) .*{frames}.*{export}"):
        find_images(tmp_path / "clips")
    with pytest.raises(ValueError, match=r"c\.NEF is not a photograph\. A camera's raw files"):
        find_images(tmp_path / "clips" / "c.NEF")
    tile(0).save(tmp_path / "clips" / "d.png")
    (note,) = passed_over(tmp_path / "clips")
    assert "passed over: 1 .mov, 1 .mp4, 1 .nef, 1 .txt. Videos (.mov, .mp4) become" in note
    (tmp_path / "clips" / "b.mov").unlink()
    (tmp_path / "clips" / "a.MP4").unlink()
    (tmp_path / "clips" / "c.NEF").unlink()
    assert passed_over(tmp_path / "clips")[0].endswith("passed over: 1 .txt.")


def test_copies_neither_calibrate_nor_are_judged(write_tiles: Write, score: Callable[..., int], tmp_path: Path) -> None:
    """Under other names, as other lossless formats, and twice in the same folder."""
    normal, images = write_tiles("normal", range(6)), write_tiles("line", range(10, 12))
    (tmp_path / "more").mkdir()
    for number, path in enumerate([*sorted(normal.iterdir()), *[normal / "tile_0.png"]]):
        Image.open(path).save(tmp_path / "more" / f"c{number}.tif")
    for name in ("x.png", "y.bmp"):
        tile(40).save(tmp_path / "more" / name)
    Image.open(normal / "tile_3.png").save(images / "new.bmp")
    tile(40).save(images / "seen.png")
    assert score(normal, images, "--calibration", str(tmp_path / "more"), "--threshold", "1e9") == 3
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["calibration_scores"]) == 7  # six references and one tile
    said = warnings_of(tmp_path / "out")
    assert "8 of the calibration photographs are copies of other normal photographs, such as c0.tif of tile_0" in said
    assert "2 of 4 images are copies of normal photographs" in said
    table = rows(tmp_path / "out")
    for name, original in (("new.bmp", "tile_3.png"), ("seen.png", "x.png")):
        assert table[name]["verdict"] == "undecided"
        assert f"a copy of a normal photograph ({original})" in table[name]["reason"]
    assert "a copy of a normal photograph (tile_3.png)" in (tmp_path / "out" / "report.html").read_text()
    assert ", 2 undecided" in (tmp_path / "out" / "report.html").read_text()


def bits(photo: Image.Image, path: Path, factor: float, kind: type = np.uint16) -> None:
    """A gray photograph in a file of wider numbers."""
    Image.fromarray((np.asarray(photo.convert("L"), dtype=float) * factor).astype(kind)).save(path)


@pytest.mark.parametrize(
    ("factor", "kind", "full"), [(4, np.uint16, 1023), (16, np.uint16, 4095), (1 / 220, np.float32, 1.0)]
)
def test_the_range_of_wide_files_is_that_of_the_normals(
    score: Callable[..., int], tmp_path: Path, factor: float, kind: type, full: float
) -> None:
    """10 and 12 bits in 16-bit files, floats with an overshoot: as the same photographs in 8 bits, to the rounding."""
    for folder in ("wide", "eight"):
        for part, seeds in (("normal", range(5)), ("line", range(20, 22))):
            (tmp_path / folder / part).mkdir(parents=True)
            for seed in seeds:
                photo = tile(seed, blob=part == "line").convert("L")
                if folder == "wide":
                    bits(photo, tmp_path / folder / part / f"{seed}.tif", factor, kind)
                else:
                    scaled = np.asarray(photo, dtype=float) * factor * 255 / full
                    Image.fromarray(np.rint(scaled.clip(0, 255)).astype(np.uint8)).save(
                        tmp_path / folder / part / f"{seed}.tif"
                    )
    found = []
    for folder in ("wide", "eight"):
        assert score(tmp_path / folder / "normal", tmp_path / folder / "line", "--false-alarm-rate", "0.2") == 1
        found.append(rows(tmp_path / "out"))
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary["full_scale"] == (full if folder == "wide" else None)
    for name in found[0]:
        assert found[0][name]["verdict"] == found[1][name]["verdict"] == "anomalous"
        assert float(found[0][name]["unlike"]) == pytest.approx(float(found[1][name]["unlike"]), rel=0.02)


def test_values_above_the_range_and_normals_in_the_dark_are_told(score: Callable[..., int], tmp_path: Path) -> None:
    for folder in ("normal", "dark", "line"):
        (tmp_path / folder).mkdir()
    for seed in range(4):
        bits(tile(seed), tmp_path / "normal" / f"{seed}.png", 4)
        bits(tile(seed), tmp_path / "dark" / f"{seed}.png", 1 / 8, np.uint8)
    bits(tile(9), tmp_path / "line" / "9.png", 7)
    assert score(tmp_path / "normal", tmp_path / "line") == 1
    assert "1 of 1 images hold values above 1023, the full scale of the normals" in warnings_of(tmp_path / "out")
    assert "unlike the normals" in rows(tmp_path / "out")["9.png"]["reason"]
    score(tmp_path / "dark", tmp_path / "line")
    assert "use less than an eighth of the range" in warnings_of(tmp_path / "out")


@pytest.mark.skipif(not FAULTS.is_dir(), reason="shared/faults is not here")
def test_12_bit_photographs_are_judged_as_their_8_bits(score: Callable[..., int], tmp_path: Path) -> None:
    found = []
    for bit in ("8", "12"):
        score(FAULTS / "bit12" / f"normal{bit}", FAULTS / "bit12" / f"images{bit}")
        found.append(rows(tmp_path / "out"))
    for name, row in found[0].items():
        assert row["verdict"] == found[1][name]["verdict"]
        assert float(row["unlike"]) == pytest.approx(float(found[1][name]["unlike"]), rel=0.02)


def test_every_page_is_a_photograph_of_its_own(write_tiles: Write, score: Callable[..., int], tmp_path: Path) -> None:
    normal, images = write_tiles("normal", range(5)), write_tiles("line", range(10, 11))
    pages = [tile(11), tile(21, blob=True), tile(12)]
    for name in ("stack.tif", "film.gif", "film.webp"):
        pages[0].save(images / name, save_all=True, append_images=pages[1:], lossless=True)
    assert score(normal, images, "--false-alarm-rate", "0.2") == 1
    table = rows(tmp_path / "out")
    pages_of = [f"{name}#{page}" for name in ("film.gif", "film.webp", "stack.tif") for page in (1, 2, 3)]
    assert list(table) == [*pages_of, "tile_10.png"]
    first, disc, third = (float(table[f"stack.tif#{page}"]["score"]) for page in (1, 2, 3))
    assert disc > 2 * max(first, third)
    assert table["stack.tif#2"]["verdict"] == "anomalous"
    assert {table[f"film.webp#{page}"]["score"] for page in (1, 2, 3)} == {
        table[f"stack.tif#{page}"]["score"] for page in (1, 2, 3)
    }
    assert len(list((tmp_path / "out" / "heatmaps").iterdir())) == 10
    assert find_images(images / "stack.tif") == [images / f"stack.tif#{page}" for page in (1, 2, 3)]


def test_links_are_followed_once_and_other_files_are_counted(write_tiles: Write, tmp_path: Path) -> None:
    images, elsewhere = write_tiles("line", range(2)), write_tiles("disk", range(5, 7))
    (images / "day2").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(images)  # in a circle
    (images / "day3").symlink_to(elsewhere)
    (images / "notes.txt").touch()
    (elsewhere / "raw.ARW").touch()
    (images / ".DS_Store").touch()
    (images / "README").touch()
    names = [path.relative_to(images).as_posix() for path in find_images(images)]
    assert names == ["day2/tile_5.png", "day2/tile_6.png", "tile_0.png", "tile_1.png"]
    (told,) = passed_over(images)
    assert "were passed over: 1 .arw, 1 .txt, 1 without suffix. A camera's raw files (.arw) become" in told
    assert passed_over(elsewhere / "tile_5.png") == []


def test_a_limit_of_pixels_can_be_moved(write_tiles: Write, score: Callable[..., int], tmp_path: Path) -> None:
    """A file that claims 196 megapixels and holds none: with more allowed it is decoded, and found empty."""
    normal, images = write_tiles("normal", range(4)), write_tiles("line", range(10, 11))
    header = struct.pack(">IIBBBBB", 14_000, 14_000, 1, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    (images / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    usual = Image.MAX_IMAGE_PIXELS
    assert score(normal, images, "--threshold", "1e9") == 3
    assert "exceeds limit of 178956970 pixels" in rows(tmp_path / "out")["large.png"]["reason"]
    assert score(normal, images, "--threshold", "1e9", "--max-pixels", "200000000") == 3
    assert "exceeds limit" not in rows(tmp_path / "out")["large.png"]["reason"]
    assert usual == Image.MAX_IMAGE_PIXELS  # for the run alone
    assert score(normal, images, "--max-pixels", "1000") == 2
