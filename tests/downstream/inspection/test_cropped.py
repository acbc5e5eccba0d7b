"""A cropped photograph: what the heatmap shows, what the report says, what a raw backbone's detector keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from adpretrain.backbones import load_backbone
from adpretrain.extractor import ADExtractor
from downstream.cli import main
from downstream.visualise import photo_and_heatmap


@pytest.fixture
def wide(write_tiles: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """Good photographs of two tiles side by side, and two new ones: a blue disc in the middle, another at the edge."""
    tiles = [Image.open(file) for file in sorted(write_tiles("tiles", range(10)).iterdir())]
    photos = []
    for left, right in zip(tiles[::2], tiles[1::2], strict=True):
        photos.append(Image.new("RGB", (192, 96)))
        photos[-1].paste(left, (0, 0))
        photos[-1].paste(right, (96, 0))
    for folder in ("good", "new"):
        (tmp_path / folder).mkdir()
    for number, photo in enumerate(photos[:4]):
        photo.save(tmp_path / "good" / f"{number}.png")
    for name, left in (("edge", 8), ("middle", 90)):
        marked = photos[4].copy()
        marked.paste((0, 0, 255), (left, 40, left + 16, 56))
        marked.save(tmp_path / "new" / f"{name}.png")
    return tmp_path / "good", tmp_path / "new"


def test_heatmaps_show_what_is_seen_and_the_summary_says_it(wide: tuple[Path, Path], tmp_path: Path) -> None:
    good, new = wide
    backbone = load_backbone("lite0", image_size=64, resize="crop", crop_from=72)
    folder = ADExtractor(backbone).save_pretrained(tmp_path / "extractor")
    out = tmp_path / "out"
    main(["score", "--extractor", str(folder), "--normal", str(good), "--images", str(new), "--out", str(out)])
    summary = json.loads((out / "summary.json").read_text())
    assert any("shorter side of 72 pixels and cropped to the central 64 x 64" in told for told in summary["warnings"])
    assert "what lies outside the crop is not inspected" in (out / "report.html").read_text()
    pixels = {}
    for name in ("edge", "middle"):
        photo, heatmap = photo_and_heatmap(Image.open(out / "heatmaps" / f"{name}.png").convert("RGB"))
        assert photo.width == photo.height == heatmap.width
        pixels[name] = np.asarray(photo).astype(int)
    blue = {name: (photo[..., 2] - photo[..., 0] > 100) for name, photo in pixels.items()}
    assert not blue["edge"].any()
    rows, columns = np.nonzero(blue["middle"])
    # Of the photograph's 192 x 96 pixels the central 85.3 x 85.3 are shown: 4.5 times as large.
    scale = len(blue["middle"]) / (96 * 64 / 72)
    assert columns.mean() == pytest.approx((98 - 96) * scale + len(blue["middle"]) / 2, abs=scale)
    assert rows.mean() == pytest.approx((48 - 48) * scale + len(blue["middle"]) / 2, abs=scale)


def test_a_detector_of_a_cropping_backbone_crops_when_it_scores(wide: tuple[Path, Path], tmp_path: Path) -> None:
    good, new = wide
    flags = ["--backbone", "lite0", "--image-size", "64", "--resize", "crop", "--crop-from", "72"]
    more = ["--detector", "patchcore", "--normal", str(good), "--out", str(tmp_path / "fitted")]
    assert main(["fit", *flags, *more]) == 0
    config = json.loads((tmp_path / "fitted" / "config.json").read_text())
    assert config["preprocess"]["crop_from"] == config["backbone"]["crop_from"] == 72
    out = tmp_path / "out"
    (tmp_path / "more").mkdir()
    for path in good.iterdir():  # others than those that it was fitted on
        ImageOps.flip(Image.open(path)).save(tmp_path / "more" / path.name)
    score = ["score", "--detector", str(tmp_path / "fitted"), "--normal", str(tmp_path / "more"), "--images", str(new)]
    assert main([*score, "--out", str(out)]) in (0, 1)
    scores = {item["path"]: item["score"] for item in json.loads((out / "summary.json").read_text())["images"]}
    assert scores["middle.png"] > scores["edge.png"]
    assert main(["fit", *flags[:4], "--crop-from", "72", *more]) == 2  # of a squeeze
