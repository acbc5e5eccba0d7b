"""`adpretrain fit` saves what the same detector made in Python predicts, and `adpretrain detectors` lists them."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from adpretrain.backbones import load_backbone
from adpretrain.extractor import ADExtractor
from downstream.cli import main
from downstream.commands.fit import parse_settings
from downstream.detectors import DETECTORS, build_detector, detector_from_pretrained
from downstream.detectors.ensemble import EnsembleConfig, ScoreUnit
from downstream.detectors.featurenorm import FeatureNorm, FeatureNormConfig
from downstream.detectors.padim import PaDiM
from downstream.detectors.patchcore import PatchCore, PatchCoreConfig
from downstream.embedding import EmbeddingConfig
from downstream.extracts import Adapted
from downstream.inspection import Options
from downstream.inspection.fitting import fit_folder
from downstream.inspection.photos import Photo, PhotoReader, find_images
from downstream.inspection.set_up import inspector_from_detector
from downstream.roi import RoiFiles
from downstream.tiles import Tiling


def pixels(folder: Path, size: int = 64) -> Tensor:
    preprocess = load_backbone("lite0", image_size=size).preprocess
    photos = [photo for batch in PhotoReader(preprocess, 8).batches(find_images(folder)) for photo in batch]
    return torch.stack([photo.pixels for photo in photos if isinstance(photo, Photo)])


def test_a_raw_backbone(write_tiles: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    normal, bad = write_tiles("normal", range(7)), write_tiles("bad", range(50, 52), blob=True)
    arguments = ["--normal", str(normal), "--out", str(tmp_path / "out"), "--batch-size", "3", "--device", "cpu"]
    arguments += ["--backbone", "lite0", "--image-size", "64", "--levels", "[1,2]"]
    assert main(["fit", *arguments, "--set", "amount=0.3", "reweight=0", "embedding.patch=5"]) == 0
    assert "patchcore fitted on 7 images: " in capsys.readouterr().out
    found = detector_from_pretrained(tmp_path / "out").predict(pixels(bad))

    backbone = load_backbone("lite0", image_size=64, levels=[1, 2])
    config = PatchCoreConfig(EmbeddingConfig(patch=5), amount=0.3, reweight=0)
    expected = PatchCore(backbone, config).fit(pixels(normal).split(3)).predict(pixels(bad))
    assert torch.equal(found.maps, expected.maps)
    assert torch.equal(found.scores, expected.scores)


def test_an_extractor_takes_its_references_first(
    write_tiles: Callable[..., Path], extractor_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every other of 6 photographs is a reference, the rest is fitted; a reference's own residuals would be zero."""
    normal, good = write_tiles("normal", range(6)), write_tiles("good", range(50, 52))
    arguments = ["--normal", str(normal), "--extractor", str(extractor_dir), "--shots", "3", "--device", "cpu"]
    assert main(["fit", "--detector", "padim", *arguments, "--out", str(tmp_path / "padim")]) == 0
    assert "padim fitted on 3 images, 3 references" in capsys.readouterr().out
    photos = pixels(normal)
    extractor = ADExtractor.from_pretrained(extractor_dir).set_references(photos[::2])
    expected = PaDiM(extractor).fit([photos[1::2]]).predict(pixels(good))
    found = detector_from_pretrained(tmp_path / "padim").predict(pixels(good))
    torch.testing.assert_close(found.maps, expected.maps, rtol=1e-5, atol=1e-5)

    assert main(["fit", "--detector", "featurenorm", *arguments, "--out", str(tmp_path / "norm")]) == 0
    assert "featurenorm fitted on 3 references: " in capsys.readouterr().out
    norm = detector_from_pretrained(tmp_path / "norm").predict(pixels(good))
    by_hand = FeatureNorm(ADExtractor.from_pretrained(extractor_dir), FeatureNormConfig(image_size=64)).fit(
        [photos[::2]]
    )
    torch.testing.assert_close(norm.maps, by_hand.predict(pixels(good)).maps)


MEMBERS = "members=[{detector: patchcore, backbone: lite0, image_size: 64}, {detector: padim}]"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ensemble", [MEMBERS, "options.sigma=2"]),
        ("refined", ["detector=padim", "options.sigma=2", "network.width=8", "network.rates=[1]", "network.epochs=1"]),
    ],
)
def test_detectors_made_of_others_are_fitted_saved_and_score(
    write_tiles: Callable[..., Path], tmp_path: Path, name: str, settings: list[str]
) -> None:
    """They go the way of all others; fitted twice, the second replaces the first."""
    normal, bad, more = (
        write_tiles("normal", range(7)),
        write_tiles("bad", (60,), blob=True),
        write_tiles("x", (70, 71)),
    )
    out = tmp_path / "out"
    raw = ["--backbone", "lite0", "--image-size", "96", "--device", "cpu", "--set", *settings]
    for _ in range(2):
        assert main(["fit", "--detector", name, "--normal", str(normal), "--out", str(out), *raw]) == 0
    detector = detector_from_pretrained(out)
    backbone = load_backbone("lite0", image_size=96)
    photos, defective = pixels(normal, 96), pixels(bad, 96)
    padim = PaDiM(backbone, dataclasses.replace(PaDiM(backbone).config, sigma=2.0)).fit([photos])
    if name == "ensemble":
        small, same = detector.members  # type: ignore[attr-defined]
        assert isinstance(small.extract, Adapted)
        assert small.extract.backbone.image_size == 64
        expected = padim.predict(defective).maps
        torch.testing.assert_close(same.predict(defective).maps, expected, rtol=1e-3, atol=1e-3)
    else:
        unit = ScoreUnit.of(padim.predict(photos).maps[:, ::4, ::4])
        assert detector._units.pixels.median == pytest.approx(unit.median, rel=1e-3)  # type: ignore[attr-defined]
    score = ["--detector", str(out), "--normal", str(more), "--images", str(bad), "--device", "cpu"]
    assert main(["score", *score, "--out", str(tmp_path / "scored")]) in (0, 1)
    (found,) = csv.DictReader((tmp_path / "scored" / "scores.csv").open())
    assert float(found["score"]) == pytest.approx(float(detector.predict(defective).scores[0]), rel=1e-3)


def test_the_members_of_the_paper() -> None:
    """ReConPatch on the three networks of PatchCore's ensemble, torchvision's first ImageNet weights of each."""
    members = EnsembleConfig().members
    assert [member.backbone for member in members] == [
        "timm/wide_resnet101_2.tv_in1k",
        "timm/resnext101_32x8d.tv_in1k",
        "timm/densenet201.tv_in1k",
    ]
    backbone = load_backbone("lite0", image_size=64)
    for member in members:
        single: Any = build_detector(member.detector, backbone, member.options)
        training, memory = single.config.training, single.config.memory
        assert (training.dim, training.epochs, training.learning_rate) == (384, 60, 1e-6)
        assert (memory.amount, memory.embedding.patch) == (0.01, 3)


def test_mistakes_are_one_line(
    write_tiles: Callable[..., Path], extractor_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    normal = str(write_tiles("normal", range(3)))
    out = str(tmp_path / "out")
    raw = ["--backbone", "lite0", "--image-size", "64"]
    for arguments, message in (
        ([], "name one network: --backbone NAME or --extractor FOLDER"),
        ([*raw, "--detector", "unet"], "detector 'unet' is unknown; choose one of featurenorm, aligned-featurenorm"),
        ([*raw, "--set", "amuont=0.1"], "unknown key amuont (did you mean amount?); known keys: embedding, amount"),
        ([*raw, "--set", "amount"], "setting 'amount' must be key=value"),
        ([*raw, "--set", "keep=2"], "keep 2.0 must be a share"),
        ([*raw, "--detector", "aligned-featurenorm"], "aligned-featurenorm needs an extractor"),
        ([*raw, "--detector", "ensemble", "--set", "members=[{levels: [1]}]"], "name the backbone too"),
        ([*raw, "--detector", "ensemble", "--set", "members=[]"], "an ensemble needs detectors"),
        ([*raw, "--detector", "refined", "--set", "detector=unet"], "detector 'unet' is unknown"),
        (["--extractor", str(extractor_dir), "--detector", "ensemble"], "its own backbone, timm/wide_resnet101"),
        (["--extractor", str(extractor_dir)], "3 normal photographs, up to 8 of which become references"),
        (["--extractor", str(extractor_dir), "--levels", "[1]"], "--levels cannot be given with --extractor"),
    ):
        assert main(["fit", "--normal", normal, "--out", out, "--device", "cpu", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    for place, message in (
        ("thesis", "thesis holds other files (thesis.txt)"),
        ("thesis/thesis.txt", "thesis.txt is a file: save into a new folder"),
        ("/dev/null/out", "/dev/null"),
    ):
        arguments = ["--normal", normal, "--out", str(tmp_path / place), "--device", "cpu"]
        assert main(["fit", *arguments, *raw]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1  # nothing was fitted: the memory it takes is told in a line of its own
    (tmp_path / "normal" / "broken.png").write_bytes(b"no image")
    assert main(["fit", "--normal", normal, "--out", out, "--device", "cpu", *raw]) == 2
    assert "every score depends on the normal photographs, and one is unreadable" in capsys.readouterr().err
    assert not Path(out).exists()


def test_settings_are_nested_yaml() -> None:
    found = parse_settings(["embedding.levels=[1, 2]", "embedding.patch=5", "amount=0.1", "projection_dim=null"])
    assert found == {"embedding": {"levels": [1, 2], "patch": 5}, "amount": 0.1, "projection_dim": None}
    with pytest.raises(ValueError, match="a already has a value"):
        parse_settings(["a=1", "a.b=2"])


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["detectors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == list(DETECTORS)
    assert lines[1].strip() == DETECTORS["featurenorm"].in_words()
    page = (Path(__file__).parents[3] / "docs" / "detectors.md").read_text(encoding="utf-8")
    for name, entry in DETECTORS.items():
        number = "" if entry.photographs is None else f"{entry.photographs} or more"
        cells = f"`{name}`", entry.summary, entry.learns, number, entry.features, entry.cost
        assert f"| {' | '.join(cells)} |" in page
    assert main(["detectors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["padim"]["name"] == "PaDiM"


@pytest.mark.parametrize("features", ["backbone", "extractor"])
@pytest.mark.parametrize("detector", ["featurenorm", "patchcore"])
def test_a_detector_is_fitted_on_tiles_within_a_region_of_interest(
    tmp_path: Path, features: str, detector: str
) -> None:
    """A mark of 9 x 9 pixels on photographs of 200 x 136 is found inside the region, and ignored outside."""
    draw = np.random.default_rng(0)
    for place, count in (("good", 6), ("more", 4)):
        (tmp_path / place).mkdir()
        for number in range(count):
            pixels = np.clip(120 + draw.normal(0, 5, (136, 200)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / place / f"{number}.png")
    (tmp_path / "line").mkdir()
    for name, left in (("inside", 30), ("outside", 170)):
        pixels = np.clip(120 + draw.normal(0, 5, (136, 200)), 0, 255).astype(np.uint8)
        pixels[60:69, left : left + 9] = 255
        Image.fromarray(pixels).save(tmp_path / "line" / f"{name}.png")
    mask = np.zeros((136, 200), np.uint8)
    mask[:, :100] = 255
    Image.fromarray(mask).save(tmp_path / "roi.png")
    backbone = load_backbone("lite0", image_size=64)
    model = backbone if features == "backbone" else ADExtractor(backbone)
    roi, fitted = RoiFiles(tmp_path / "roi.png"), tmp_path / "fitted"
    options = {"embedding": {"levels": [-2, -1]}} if detector == "patchcore" else {}
    if (features, detector) == ("backbone", "featurenorm"):  # nothing to fit, and its plain norm finds nothing
        return
    fit_folder(detector, model, tmp_path / "good", fitted, options, shots=3, tiling=Tiling(64), roi=roi)
    given = Options(false_alarm_rate=0.2, roi=str(tmp_path / "roi.png"))
    inspector = inspector_from_detector(fitted, torch.device("cpu"), tmp_path / "more", options=given)
    scored = inspector.score(next(inspector.reader.batches([tmp_path / "line" / "inside.png"])))
    ignored = inspector.score(next(inspector.reader.batches([tmp_path / "line" / "outside.png"])))
    found, missed = (inspector.judge("photo", one[0]) for one in (scored, ignored))  # type: ignore[arg-type]
    assert found.verdict == "anomalous"
    assert "score" not in missed.reason
    assert inspector.regions(scored[0])[0].box[0] < 60  # type: ignore[arg-type]
    assert all(region.box[2] <= 104 for region in inspector.regions(ignored[0]))  # type: ignore[arg-type]
