"""What is wrong everywhere in a photograph raises an alarm, good photographs raise no more than promised, and a run
with too many alarms says so; whatever the extractor."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from drawn import tile
from PIL import Image, ImageFilter, ImageOps

from adpretrain.backbones import load_backbone
from adpretrain.extractor import ADExtractor
from downstream.cli import main
from downstream.inspection import Options
from downstream.inspection.run import EXIT_ANOMALY, score_folder

SHARED = Path(__file__).parents[4] / "shared"
Write = Callable[..., Path]


def score(extractor: Path, normal: Path, images: Path, out: Path, *more: str) -> dict[str, dict[str, str]]:
    folders = ["--normal", str(normal), "--images", str(images), "--out", str(out)]
    assert main(["score", "--extractor", str(extractor), *folders, "--device", "cpu", *more]) in (0, 1)
    with (out / "scores.csv").open() as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def test_a_photograph_that_is_wrong_everywhere_is_anomalous_and_says_in_what(
    write_tiles: Write, extractor_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    normal, images = write_tiles("normal", range(10)), write_tiles("line", range(10, 12))
    photo = tile(13)
    red, green, blue = photo.split()
    cases = {
        "quarter": photo.point(lambda value: value // 4),
        "negative": ImageOps.invert(photo),
        "colour": Image.merge("RGB", (blue, green, red)),
        "defocus": photo.filter(ImageFilter.GaussianBlur(3)),
    }
    for name, changed in cases.items():
        changed.save(images / f"{name}.png")
    table = score(extractor_dir, normal, images, tmp_path / "out", "--false-alarm-rate", "0.1")
    for name in cases:
        assert table[f"{name}.png"]["verdict"] == "anomalous"
        assert "unlike the normals: " in table[f"{name}.png"]["reason"]
        assert float(table[f"{name}.png"]["unlike_p_value"]) == pytest.approx(1 / 11)
    assert table["colour.png"]["measure"] == "colour"
    assert table["defocus.png"]["measure"] == "sharpness"
    assert {table[f"tile_{seed}.png"]["verdict"] for seed in (10, 11)} == {"normal"}
    entries = {entry["path"]: entry for entry in json.loads((tmp_path / "out/summary.json").read_text())["images"]}
    assert entries["colour.png"]["reason"] == table["colour.png"]["reason"]
    assert float(table["colour.png"]["unlike"]) == entries["colour.png"]["unlike"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "unlike the normals: sharpness" in page
    told = capsys.readouterr().out
    assert "unlike the normals: colour" in told
    # Four of six are more than one in eleven gives by chance.
    assert "4 of 6 images are anomalous: more than normal photographs like the given ones would give" in told
    assert "more than normal photographs like the given ones" in page


def test_white_noise_with_four_references(write_tiles: Write, extractor_dir: Path, tmp_path: Path) -> None:
    normal = write_tiles("normal", range(4))
    (tmp_path / "line").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "line" / "noise.png")
    table = score(extractor_dir, normal, tmp_path / "line", tmp_path / "out")
    assert table["noise.png"]["verdict"] == "anomalous"


def test_a_run_of_good_photographs_says_nothing_of_drift(
    write_tiles: Write, extractor_dir: Path, tmp_path: Path
) -> None:
    normal, images = write_tiles("normal", range(10)), write_tiles("line", range(20, 32))
    score(extractor_dir, normal, images, tmp_path / "out", "--false-alarm-rate", "0.1")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["more_alarms_than_promised"] is False


@pytest.mark.skipif(not (SHARED / "faults").is_dir(), reason="shared/faults is not here")
@pytest.mark.parametrize("extractor", ["raw", "embedded"])
def test_the_global_faults_do_not_pass(extractor: str, tmp_path: Path) -> None:
    faults = SHARED / "faults" / "global"
    raw = ADExtractor(load_backbone("lite0", image_size=128), projector=None)
    model = raw.save_pretrained(tmp_path / "raw") if extractor == "raw" else extractor
    found = score_folder(model, faults / "normal", faults / "images", tmp_path / "out", device="cpu")
    assert found.exit_code == EXIT_ANOMALY
    assert {result.verdict for result in found.results} == {"anomalous"}


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data" / "mtd").is_dir(), reason="shared/data/mtd is not here")
def test_good_photographs_raise_no_more_alarms_than_promised(extractor_dir: Path, tmp_path: Path) -> None:
    """Real tiles whose light drifts, in four draws of other strides: 4 references and 36 that calibrate, 10 %."""
    tiles = sorted((SHARED / "data" / "mtd" / "MT_Free" / "Imgs").glob("*.jpg"))
    alarms = judged = 0
    for draw in range(4):
        normal, line = tmp_path / f"normal{draw}", tmp_path / f"line{draw}"
        for folder, paths in ((normal, tiles[draw::24]), (line, tiles[draw + 7 :: 12])):
            folder.mkdir()
            for path in paths:
                (folder / path.name).symlink_to(path)
        options = Options(false_alarm_rate=0.1, shots=4)
        found = score_folder(extractor_dir, normal, line, tmp_path / "out", options=options, device="cpu")
        alarms += found.summary["counts"]["anomalous"]
        judged += len(found.results)
        assert not found.summary["more_alarms_than_promised"]
    assert alarms / judged < 0.13  # 10 %, and the spread over four calibration sets of 36
