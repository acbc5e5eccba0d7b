"""`adpretrain extract` and `adpretrain backbones` as a user runs them: tensors, index, exit codes, bad input."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from adpretrain.backbones import BACKBONES, load_backbone
from adpretrain.extractor import ADExtractor
from adpretrain.licences import LICENCES
from adpretrain.photographs import read_image
from downstream.cli import main
from downstream.inspection.extraction import join

Write = Callable[..., Path]


def extract(*arguments: str | Path) -> int:
    return main(["extract", *map(str, arguments), "--device", "cpu"])


def read(folder: Path, model: ADExtractor | torch.nn.Module) -> Tensor:
    return torch.stack([model.preprocess(read_image(path)) for path in sorted(folder.rglob("*.png"))])


def stored(out: Path) -> dict[str, list[Tensor]]:
    """Path of an image -> its levels, through the index."""
    index = json.loads((out / "index.json" if out.is_dir() else out.with_suffix(".json")).read_text())
    folder = out if out.is_dir() else out.parent
    found = {}
    for entry in index["images"]:
        tensors = load_file(folder / entry["file"])
        found[entry["path"]] = [tensors[level["tensor"]][entry["row"]] for level in index["levels"]]
    return found


@pytest.fixture
def images(write_tiles: Write) -> Path:
    """7 tiles in two folders, named so that path order is not the order of writing."""
    write_tiles("line/b", range(4))
    return write_tiles("line/a", range(10, 13), blob=True).parent


@pytest.mark.parametrize("name", ["features", "features.safetensors"])
def test_the_features_are_the_backbone_s(images: Path, name: str, tmp_path: Path) -> None:
    out = tmp_path / "out" / name
    arguments = ["--backbone", "lite0", "--images", images, "--out", out]
    assert extract(*arguments, "--image-size", "64", "--levels", "[1,3]", "--batch-size", "3") == 0
    backbone = load_backbone("lite0", image_size=64, levels=[1, 3])
    expected = backbone(read(images, backbone))
    found = stored(out)
    assert list(found) == [f"a/tile_{i}.png" for i in (10, 11, 12)] + [f"b/tile_{i}.png" for i in range(4)]
    for row, levels in enumerate(found.values()):
        for level, whole in zip(levels, expected, strict=True):  # of a batch of another size
            torch.testing.assert_close(level, whole[row], rtol=1e-4, atol=1e-4)
    index = json.loads((out / "index.json" if out.is_dir() else out.with_suffix(".json")).read_text())
    assert index["backbone"]["levels"] == [1, 3]
    assert [(level["number"], level["channels"], level["grid"]) for level in index["levels"]] == [
        (1, 24, [16, 16]),
        (3, 112, [4, 4]),
    ]
    files = sorted(path.name for path in (out if out.is_dir() else out.parent).iterdir())
    if out.is_dir():
        assert files == [*(f"features-0000{shard}.safetensors" for shard in range(3)), "index.json"]
    else:
        assert files == ["features.json", "features.safetensors"]


def test_the_features_are_the_extractor_s(
    images: Path, write_tiles: Write, extractor_dir: Path, tmp_path: Path
) -> None:
    shots, out = write_tiles("shots", range(20, 26)), tmp_path / "out"
    arguments = ["--extractor", extractor_dir, "--normal", shots, "--images", images, "--out", out]
    assert extract(*arguments, "--shots", "3", "--batch-size", "2") == 0
    extractor = ADExtractor.from_pretrained(extractor_dir)
    expected = extractor.set_references(read(shots, extractor)[::2])(read(images, extractor))
    for row, levels in enumerate(stored(out).values()):
        for level, whole in zip(levels, expected, strict=True):
            torch.testing.assert_close(level, whole[row], rtol=1e-4, atol=1e-4)  # batches round differently


def test_unreadable_images_are_listed_and_the_rest_is_written(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (images / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (images / "b" / "tile_1.png").write_bytes(b"")
    arguments = ["--backbone", "lite0", "--images", images, "--image-size", "64", "--batch-size", "2"]
    assert extract(*arguments, "--out", out) == 3
    index = json.loads((out / "index.json").read_text())
    assert [entry["path"] for entry in index["unreadable"]] == ["a/broken.png", "b/tile_1.png"]
    assert len(stored(out)) == 6
    assert "unreadable: a/broken.png (" in capsys.readouterr().out
    assert extract(*arguments, "--out", tmp_path / "one.safetensors") == 3
    for path, levels in stored(tmp_path / "one.safetensors").items():
        assert all(torch.equal(a, b) for a, b in zip(levels, stored(out)[path], strict=True))
    only = tmp_path / "only"
    only.mkdir()
    (only / "x.png").write_bytes(b"")
    assert extract("--backbone", "lite0", "--images", only, "--out", tmp_path / "none") == 2
    assert "none of the 1 images could be read" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["features", "features.safetensors"])
def test_a_run_that_fails_leaves_the_earlier_one(
    images: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / name
    arguments = ["--backbone", "lite0", "--images", images, "--image-size", "64", "--out", out]
    assert extract(*arguments) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    written, calls = safetensors.torch.serialize_file, []

    def interrupted(*values: object, **more: object) -> None:
        calls.append(values)
        if len(calls) == 3:
            raise KeyboardInterrupt
        written(*values, **more)

    monkeypatch.setattr(safetensors.torch, "serialize_file", interrupted)
    assert extract(*arguments, "--levels", "[1]", "--batch-size", "2") == 130
    assert len(calls) == 3
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    assert extract(*arguments, "--levels", "[1]", "--batch-size", "7") == 0  # replaces it whole
    assert all(len(levels) == 1 for levels in stored(out).values())
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_joined_shards_are_a_file_that_safetensors_reads(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shards, parts = [], []
    for number, rows in enumerate((3, 1, 2)):
        part = {f"level_{i}": torch.randn(rows, 5, i + 1, 3, generator=generator).to(dtype) for i in range(3)}
        save_file(part, tmp_path / f"{number}.safetensors")
        shards.append(tmp_path / f"{number}.safetensors")
        parts.append(part)
    join(shards, tmp_path / "all.safetensors")
    joined = load_file(tmp_path / "all.safetensors")
    for name, tensor in joined.items():
        assert torch.equal(tensor, torch.cat([part[name] for part in parts]))
    with safe_open(tmp_path / "all.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("level_2")[4:5].shape == (1, 5, 3, 3)


def test_bad_usage_is_one_line_and_nothing_is_written(
    images: Path, extractor_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    bank = ["--backbone", "lite0"]
    cases: list[tuple[list[str | Path], str]] = [
        (["--out", "x"], "name one network: --backbone NAME or --extractor FOLDER"),
        ([*bank, "--extractor", extractor_dir, "--out", "x"], "name one network"),
        (["--extractor", extractor_dir, "--out", "x"], "name their folder with --normal"),
        ([*bank, "--normal", images, "--out", "x"], "--normal goes with --extractor"),
        (
            ["--extractor", extractor_dir, "--normal", images, "--levels", "[1]", "--out", "x"],
            "--levels cannot be given with --extractor",
        ),
        ([*bank, "--out", mine], "holds other files (thesis.txt ...)"),
        ([*bank, "--out", tmp_path / "weights.safetensors"], "was not written by an earlier run"),
        ([*bank, "--out", mine / "thesis.txt"], "is a file: name a folder"),
        ([*bank, "--levels", "[7]", "--out", "x"], "list some of its stages (of strides 4, 8 and 16) 1, 2, 3"),
        ([*bank, "--weights", "w.pth", "--out", "x"], "weights file w.pth does not exist"),
        ([*bank, "--batch-size", "0", "--out", "x"], "expected at least 1"),
        (["--backbone", "resnet9000", "--out", "x"], "'resnet9000' is unknown"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in cases:
        assert extract("--images", images, *arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("x").exists()


def test_the_list_of_backbones_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backbones", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(BACKBONES)
    assert rows["imagebind"]["licence"] == "CC-BY-NC-SA-4.0"
    assert [name for name, row in rows.items() if row["product"] == "no"] == ["imagebind"]
    assert rows["dinov2-large"]["levels"] == [6, 12, 18, 24]
    assert rows["lite0"]["cached"] is True  # its weights ship
    os.environ.pop("COLUMNS", None)
    assert main(["backbones"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, row in rows.items():
        (line,) = (line for line in lines if f" {name} " in line)
        assert row["licence"] in line
        assert f"| {row['product']} " in line
        assert " ".join(map(str, row["levels"])) in line
    assert all(line.isascii() for line in lines)


def test_what_may_be_used_in_a_product_is_listed_with_its_conditions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backbones", "--commercial", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(BACKBONES) - {"imagebind"}
    assert {rows[name]["product"] for name in ("lite0", "dinov2-base", "siglip2-base", "pe-core-base")} == {"yes"}
    assert rows["dinov3-base"]["product"] == rows["c-radio-v3-base"]["product"] == "with conditions"
    assert "copy of it" in rows["dinov3-base"]["terms"]
    os.environ.pop("COLUMNS", None)
    assert main(["backbones", "--commercial"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "imagebind" not in told
    for licence in ("DINOv3 License", "NVIDIA Open Model License"):
        assert f"{licence}: {LICENCES[licence].terms}" in told
    assert "see the licence on its page on the Hub" not in told  # what nobody knows may not be allowed
