"""`adpretrain score --detector`: a fitted detector on photographs, with a threshold of normal ones it has not seen."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from adpretrain.backbones import load_backbone
from adpretrain.photographs import read_image
from downstream.calibration import calibrate
from downstream.cli import main
from downstream.detectors import detector_from_pretrained
from downstream.detectors.ensemble import Ensemble
from downstream.detectors.padim import PaDiM
from downstream.detectors.patchcore import PatchCore
from downstream.inspection.set_up import PERHAPS_FITTED, preprocess_of

Write = Callable[..., Path]
Scene = tuple[Path, Path, Path]


def score(normal: Path, images: Path, out: Path, *more: str) -> int:
    folders = ["--normal", str(normal), "--images", str(images), "--out", str(out)]
    return main(["score", *folders, "--device", "cpu", "--false-alarm-rate", "0.2", *more])


def rows(out: Path) -> dict[str, tuple[str, str, str]]:
    with (out / "scores.csv").open() as file:
        return {row["path"]: (row["score"], row["p_value"], row["verdict"]) for row in csv.DictReader(file)}


@pytest.fixture
def scene(write_tiles: Write) -> Scene:
    """Normal photographs to fit on, further ones, and new ones: two good, two with a disc, one blank."""
    fit, further = write_tiles("fit", range(4)), write_tiles("further", range(30, 36))
    write_tiles("line", range(10, 12))
    images = write_tiles("line", range(20, 22), blob=True, prefix="disc")
    Image.new("RGB", (96, 96), (90, 90, 90)).save(images / "blank.png")
    return fit, further, images


def fitted(scene: Scene, folder: Path, detector: str, *more: str) -> str:
    flags = ["--detector", detector, "--normal", str(scene[0]), "--out", str(folder), "--device", "cpu", *more]
    assert main(["fit", *flags]) == 0
    return str(folder)


def test_scores_and_threshold_are_the_detectors(scene: Scene, tmp_path: Path) -> None:
    folder = fitted(scene, tmp_path / "det", "patchcore", "--backbone", "lite0", "--image-size", "64")
    assert score(scene[1], scene[2], tmp_path / "out", "--detector", folder, "--batch-size", "3") == 1
    detector, preprocess = detector_from_pretrained(folder), load_backbone("lite0", image_size=64).preprocess

    def predicted(names: list[Path]) -> list[float]:
        return [float(detector.predict(preprocess(read_image(name))[None]).scores[0]) for name in names]

    found = rows(tmp_path / "out")
    assert found.pop("blank.png")[2] == "unreadable"
    expected = predicted([scene[2] / name for name in found])
    torch.testing.assert_close(torch.tensor([float(row[0]) for row in found.values()]), torch.tensor(expected))
    assert {name: row[2] for name, row in found.items()} == {
        "disc_20.png": "anomalous",
        "disc_21.png": "anomalous",
        "tile_10.png": "normal",
        "tile_11.png": "normal",
    }
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    calibration = calibrate((), 0.2, predicted(sorted(scene[1].iterdir())))
    assert summary["threshold"] == pytest.approx(calibration.threshold, rel=1e-5)
    assert (summary["detector"], summary["references"], summary["promised_false_alarm_rate"]) == (folder, 0, 1 / 7)
    assert PERHAPS_FITTED not in summary["warnings"]


def test_photographs_that_a_detector_knows_do_not_calibrate_it(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under other names and re-encoded; a folder of an earlier version knows none and says so."""
    known, further, images = scene
    network = ["--backbone", "lite0", "--image-size", "64"]
    folder = fitted(scene, tmp_path / "det", "patchcore", *network)
    (tmp_path / "renamed").mkdir()
    for number, path in enumerate(sorted(known.iterdir())):
        Image.open(path).save(tmp_path / "renamed" / f"n{number}.bmp")
    assert score(tmp_path / "renamed", images, tmp_path / "out", "--detector", folder) == 2
    assert "the detector was fitted on all 4 normal photographs" in capsys.readouterr().err
    Image.open(known / "tile_2.png").save(further / "again.tif")
    assert score(further, images, tmp_path / "out", "--detector", folder) == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["calibration_scores"]) == 6
    assert any("1 of the normal photographs are copies" in warning for warning in summary["warnings"])

    config = json.loads((tmp_path / "det" / "config.json").read_text())
    assert len(config.pop("photographs")) == 4
    del config["full_scale"]
    (tmp_path / "det" / "config.json").write_text(json.dumps(config))
    score(tmp_path / "renamed", images, tmp_path / "out", "--detector", folder)
    assert PERHAPS_FITTED in json.loads((tmp_path / "out" / "summary.json").read_text())["warnings"]


def test_a_fitted_featurenorm_gives_what_its_references_give(scene: Scene, extractor_dir: Path, tmp_path: Path) -> None:
    """Calibrated on the same further photographs: every score, p-value and verdict."""
    extractor = ["--extractor", str(extractor_dir)]
    folder = fitted(scene, tmp_path / "det", "featurenorm", *extractor)
    score(scene[1], scene[2], tmp_path / "fitted", "--detector", folder)
    score(scene[0], scene[2], tmp_path / "direct", *extractor, "--calibration", str(scene[1]))
    assert rows(tmp_path / "fitted") == rows(tmp_path / "direct")


def test_an_ensemble_says_how_its_photographs_are_prepared(scene: Scene, tmp_path: Path) -> None:
    backbone = load_backbone("lite0", image_size=64)
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    folder = Ensemble([PaDiM(backbone), PatchCore(backbone)]).fit([images]).save_pretrained(tmp_path / "det")
    assert preprocess_of(folder) == backbone.preprocess
    assert score(scene[1], scene[2], tmp_path / "out", "--detector", str(folder)) in (1, 3)
    assert len(rows(tmp_path / "out")) == 5


def test_another_detector_cannot_go_on(scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--backbone", "lite0", "--image-size", "64"]
    first, other = (fitted(scene, tmp_path / name, name, *flags) for name in ("patchcore", "padim"))
    out = tmp_path / "out"
    assert score(scene[1], scene[2], out, "--detector", first) == 1
    part = {"settings": {"extractor or detector": "0" * 64}}
    (out / "scores.part.jsonl").write_text(json.dumps(part) + "\n")
    assert score(scene[1], scene[2], out, "--detector", other, "--resume") == 2
    assert "other settings: extractor or detector" in capsys.readouterr().err


def test_mistakes_are_named(
    scene: Scene, extractor_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def given(images: torch.Tensor) -> list[torch.Tensor]:
        return [images[:, :, ::4, ::4]]

    folder = fitted(scene, tmp_path / "det", "padim", "--backbone", "lite0", "--image-size", "64")
    own = PatchCore(given).fit([torch.rand(4, 3, 64, 64)]).save_pretrained(tmp_path / "own")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"none")
    for normal, flags, message in (
        (scene[1], ["--detector", folder, "--shots", "2", "--seed", "1"], "--shots and --seed cannot be given with"),
        (scene[1], ["--detector", str(extractor_dir)], "key detector is missing; expected a folder written by a det"),
        (scene[1], ["--extractor", folder], "expected a folder written by ADExtractor.save_pretrained"),
        (scene[1], ["--detector", str(own)], "it is not known how to prepare photographs for it"),
        (tmp_path / "bad", ["--detector", folder], "no normal photograph can be used: "),
    ):
        assert score(normal, scene[2], tmp_path / "out", *flags) == 2, flags
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "scores.csv").exists()
