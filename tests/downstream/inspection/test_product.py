"""A saved inspector, and the folder of a product: the same bits as fitting anew, undo, no loss when it is killed."""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from adpretrain import ADExtractor, load_backbone
from adpretrain.extractor import LocalScale
from downstream.cli import main
from downstream.inspection import DEFAULTS, Options
from downstream.inspection import product as module
from downstream.inspection.fitting import fit_folder
from downstream.inspection.inspector import Inspector, Scored
from downstream.inspection.photos import Photo, PhotoReader
from downstream.inspection.product import (
    PRODUCT,
    TABLES,
    change_product,
    load_inspector,
    new_product,
    read_product,
    undo,
    version_folder,
    with_photographs,
    without_photographs,
)
from downstream.inspection.set_up import inspector_from_detector, inspector_from_folder, inspector_from_photos
from downstream.tiles import Tiling

CPU = torch.device("cpu")
SIDE = 64


@pytest.fixture(scope="module")
def extractor() -> ADExtractor:
    backbone = load_backbone("lite0", image_size=SIDE, finest=8)
    return ADExtractor(backbone, local_scale=LocalScale(len(backbone.channels)))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, draw = tmp_path_factory.mktemp("good"), np.random.default_rng(0)
    paths = [folder / f"{number:02}.png" for number in range(10)]
    for path in paths:
        Image.fromarray(np.clip(120 + draw.normal(0, 20, (80, 90, 3)), 0, 255).astype(np.uint8)).save(path)
    return paths


def read(extractor: ADExtractor, paths: list[Path]) -> list[Photo]:
    found = [item for batch in PhotoReader(extractor.preprocess, 16).batches(paths) for item in batch]
    assert all(isinstance(item, Photo) for item in found)
    return found  # type: ignore[return-value]


def anew(extractor: ADExtractor, paths: list[Path], options: Options = DEFAULTS) -> Inspector:
    return inspector_from_photos(extractor, CPU, read(extractor, paths), options)


def same(found: Inspector, expected: Inspector, extractor: ADExtractor, paths: list[Path]) -> None:
    """The same facts on the normal photographs, thresholds, and scores and maps of others, to the bit."""
    assert found.normals == expected.normals
    assert (found.threshold, found.pixel_limit, found.scale) == (
        expected.threshold,
        expected.pixel_limit,
        expected.scale,
    )
    for one, other in zip(*(inspector.score(read(extractor, paths)) for inspector in (found, expected)), strict=True):
        assert isinstance(one, Scored)
        assert isinstance(other, Scored)
        assert one.score == other.score
        np.testing.assert_array_equal(one.map_HW, other.map_HW)
        assert found.judge("photo", one) == expected.judge("photo", other)


def test_a_saved_inspector_gives_the_same_bits(extractor: ADExtractor, photos: list[Path], tmp_path: Path) -> None:
    inspector = anew(extractor, photos[:6], Options(0.2, least_area=20, mm_per_pixel=0.1))
    same(Inspector.load(inspector.save(tmp_path / "saved")), inspector, extractor, photos[6:])


@pytest.mark.parametrize("kind", ["region of interest", "tiles", "aligned", "patchcore"])
def test_every_kind_of_inspector_is_saved(
    kind: str, extractor: ADExtractor, photos: list[Path], tmp_path: Path
) -> None:
    folder, options = photos[0].parent, Options(0.2)
    if kind == "patchcore":
        fit_folder(kind, extractor.backbone, folder, tmp_path / "fitted", {"embedding": {"levels": [-2, -1]}})
        for number in range(3):
            pixels = np.asarray(Image.open(photos[number])).astype(int) + number + 1
            (tmp_path / "more").mkdir(exist_ok=True)
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(tmp_path / "more" / f"{number}.png")
        inspector = inspector_from_detector(tmp_path / "fitted", CPU, tmp_path / "more", options=options)
    else:
        if kind == "region of interest":
            mask = np.zeros((80, 90), np.uint8)
            mask[10:60, 20:80] = 255
            Image.fromarray(mask).save(tmp_path / "mask.png")
            options = dataclasses.replace(options, roi=str(tmp_path / "mask.png"))
        elif kind == "tiles":
            options = dataclasses.replace(options, tiling=Tiling(SIDE))
        else:
            options = dataclasses.replace(options, references="aligned", shots=4)
        inspector = inspector_from_folder(extractor, CPU, folder, options=options)
    loaded = Inspector.load(inspector.save(tmp_path / "saved"))
    line = tmp_path / "line.png"
    Image.fromarray(np.full((80, 90, 3), 120, np.uint8) + np.arange(90, dtype=np.uint8)[:, None]).save(line)
    found, expected = (one.score(next(one.reader.batches([line]))) for one in (loaded, inspector))
    assert isinstance(found[0], Scored)
    assert isinstance(expected[0], Scored)
    assert loaded.judge("photo", found[0]) == inspector.judge("photo", expected[0])
    np.testing.assert_array_equal(found[0].map_HW, expected[0].map_HW)
    if kind in ("tiles", "aligned"):
        with pytest.raises(ValueError, match="begin anew with adpretrain inspector new"):
            with_photographs(loaded, [item for batch in loaded.reader.batches([line]) for item in batch])


def test_adding_and_forgetting_equal_fitting_anew(extractor: ADExtractor, photos: list[Path], tmp_path: Path) -> None:
    start = anew(extractor, photos[:4])
    grown, remarks = with_photographs(start, read(extractor, [*photos[4:7], photos[0]]))
    assert remarks == ["left out: 00.png is there already"]
    same(grown, anew(extractor, photos[:7]), extractor, photos[7:])
    loaded = Inspector.load(grown.save(tmp_path / "saved"))  # its leave-one-out tables are extended and cut
    again, _ = with_photographs(loaded, read(extractor, photos[7:8]))
    same(again, anew(extractor, photos[:8]), extractor, photos[8:])
    fewer = without_photographs(again, ["01.png", "06.png"])
    same(fewer, anew(extractor, [photos[number] for number in (0, 2, 3, 4, 5, 7)]), extractor, photos[8:])
    same(without_photographs(grown, [path.name for path in photos[1:7]]), anew(extractor, photos[:1]), extractor, [])
    with pytest.raises(ValueError, match="no normal photograph is named 'x'; there are 00"):
        without_photographs(grown, ["x"])
    with pytest.raises(ValueError, match="no normal photograph would be left"):
        without_photographs(start, [path.name for path in photos[:4]])


def test_a_version_for_each_change_and_undo(extractor: ADExtractor, photos: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "product"
    new_product(folder, anew(extractor, photos[:3]))
    for number in range(3, 6):
        added = read(extractor, photos[number : number + 1])
        change_product(folder, "add", [photos[number].name], lambda old, added=added: with_photographs(old, added)[0])
    assert [len(load_inspector(version_folder(folder, version)).normals) for version in (1, 2, 3, 4)] == [3, 4, 5, 6]
    assert [(version_folder(folder, version) / TABLES).exists() for version in (1, 2, 3, 4)] == [False] * 3 + [True]
    undo(folder)
    undo(folder)
    same(load_inspector(folder), anew(extractor, photos[:4]), extractor, photos[6:])
    change_product(folder, "forget", ["00.png"], lambda old: without_photographs(old, ["00.png"]))
    same(load_inspector(folder), anew(extractor, photos[1:4]), extractor, photos[6:])
    product = read_product(folder)
    assert product.chain == [1, 2, 5]
    assert [change.what for change in product.log][3:] == ["add", "undo of version 4", "undo of version 3", "forget"]
    assert sorted(path.name for path in (folder / "versions").iterdir()) == ["0001", "0002", "0005"]
    with pytest.raises(ValueError, match="exists: give a new folder"):
        new_product(folder, anew(extractor, photos[:3]))


@pytest.mark.parametrize("step", ["save_inspector", "_write"])
def test_a_change_that_fails_leaves_the_former_version(
    step: str, extractor: ADExtractor, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "product"
    new_product(folder, anew(extractor, photos[:3]))
    before = (folder / PRODUCT).read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    def add(old: Inspector) -> Inspector:
        return with_photographs(old, read(extractor, photos[3:4]))[0]

    with monkeypatch.context() as broken:
        broken.setattr(module, step, killed)
        with pytest.raises(KeyboardInterrupt):
            change_product(folder, "add", ["03.png"], add)
    assert (folder / PRODUCT).read_bytes() == before
    same(load_inspector(folder), anew(extractor, photos[:3]), extractor, photos[6:])
    change_product(folder, "add", ["03.png"], add)  # what the killed change has left is written over
    same(load_inspector(folder), anew(extractor, photos[:4]), extractor, photos[6:])


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "newer": (lambda f: _edit(f / "inspector.json", format_version=9), "newer adpretrain"),
    "no normals": (lambda f: _edit(f / "inspector.json", normals=[]), "lists no normal photographs"),
    "a word": (lambda f: _edit(f / "inspector.json", full_scale="white"), "full_scale"),
    "tables": (lambda f: (f / TABLES).write_bytes(b"no"), "delete it, and it is computed anew"),
    "no inspector": (lambda f: (f / "inspector.json").unlink(), "holds no inspector"),
}


def _edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_folder_is_refused(case: str, extractor: ADExtractor, photos: list[Path], tmp_path: Path) -> None:
    folder = anew(extractor, photos[:3]).save(tmp_path / "saved")
    change, message = WRONG[case]
    change(folder)
    with pytest.raises(ValueError, match=message):
        Inspector.load(folder)
    if case == "tables":
        (folder / TABLES).unlink()
        same(Inspector.load(folder), anew(extractor, photos[:3]), extractor, photos[6:])
        assert not load_file(folder / "detector" / "model.safetensors").keys() & {"weight"}


def test_the_console_keeps_a_product(photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at, good, line, out = (str(tmp_path / name) for name in ("product", "good", "line", "out"))
    for place, chosen in ((good, photos[:5]), (line, photos[5:])):
        Path(place).mkdir()
        for path in chosen:
            Image.open(path).save(Path(place) / path.name)
    marked = np.array(Image.open(photos[9]))
    marked[20:40, 20:40] = 255
    Image.fromarray(marked).save(Path(line) / "marked.png")
    assert main(["inspector", "new", "--at", at, "--normal", good, "--false-alarm-rate", "0.2"]) == 0
    assert "version 1, 5 normal photographs, threshold" in capsys.readouterr().out
    score = ["score", "--at", at, "--images", line, "--out", out]
    assert main(score) == 1
    with Path(out, "scores.csv").open() as file:
        alarms = [row["path"] for row in csv.DictReader(file) if row["verdict"] == "anomalous"]
    assert "marked.png" in alarms
    assert main(["inspector", "add", "--at", at, "--accept", f"{out}/scores.csv", "--images", line]) == 0
    told = capsys.readouterr().out
    assert "note: marked.png was anomalous so far (score" in told
    assert f"version 2, {5 + len(alarms)} normal photographs" in told
    assert main(score) in (0, 3)
    assert main(["inspector", "forget", "marked.png", "--at", at]) == 0
    assert main(["inspector", "undo", "--at", at]) == 0
    assert main(["inspector", "list", "--at", at]) == 0
    told = capsys.readouterr().out
    assert "\n  references: 00.png, 01.png, 02.png, 03.png, 04.png" in told
    assert "version 3: forget, 1 photograph\n" in told
    assert told.endswith("version 2: undo of version 3\n")
    for wrong, message in (
        (["inspector", "add", "--at", at], "add what"),
        (["inspector", "new", "--at", at], "new needs it"),
        ([*score, "--normal", good], "--normal cannot be given with --at"),
        (
            ["inspector", "new", "--at", at, "--normal", good],
            "or add photographs to the inspector there with adpretrain",
        ),
        (["inspector", "add", good, "--at", at], "no photograph can be added: 00.png is there already"),
        (["inspector", "list", "--at", good], f"make one with adpretrain inspector new --at {good} --normal GOOD"),
        ([*score, "--shots", "3"], "--shots cannot be given with --at"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_adding_one_of_many_takes_a_fraction_of_the_time(extractor: ADExtractor, tmp_path: Path) -> None:
    draw, paths = np.random.default_rng(1), [tmp_path / f"{number:03}.png" for number in range(31)]
    for path in paths:
        Image.fromarray(draw.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    known, new = read(extractor, paths[:30]), read(extractor, paths[30:])
    start = inspector_from_photos(extractor, CPU, known)
    assert start.detector.extract.references.tables  # type: ignore[attr-defined]
    begin = time.process_time()
    with_photographs(start, new)
    middle = time.process_time()
    inspector_from_photos(extractor, CPU, [*known, *new])
    assert (time.process_time() - middle) > 2 * (middle - begin)
