"""`adpretrain check-data` as a user runs it: the table, every problem, exit codes, JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from downstream.cli import main

Write = Callable[..., Path]


@pytest.fixture
def bottles(write_tiles: Write, tmp_path: Path) -> Path:
    """Two categories in MVTec's layout, with a validation split in one."""
    for category in ("bottle", "cable"):
        write_tiles(f"set/{category}/train/good", range(3))
        write_tiles(f"set/{category}/test/good", range(10, 12))
        bad = write_tiles(f"set/{category}/test/crack", range(20, 21), blob=True)
        truth = tmp_path / f"set/{category}/ground_truth/crack/tile_20_mask.png"
        truth.parent.mkdir(parents=True)
        Image.open(bad / "tile_20.png").convert("L").point(lambda value: 255 * (value < 50)).save(truth)
    write_tiles("set/cable/validation/good", range(30, 31))
    return tmp_path / "set"


def check(root: Path | str, *more: str) -> int:
    return main(["check-data", "--root", str(root), *more])


def test_a_sound_set(bottles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(bottles) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{bottles}: 13 images in the mvtec layout"
    assert [line.split() for line in lines[2:5]] == [
        ["bottle", "3", "0", "0", "0", "2", "1"],
        ["cable", "3", "0", "1", "0", "2", "1"],
        ["all", "6", "0", "1", "0", "4", "2"],
    ]
    assert lines[1].split("  ")[0] == "category"
    assert lines[1].index("test anomalous") + len("test anomalous") == len(lines[2])  # the columns are aligned
    assert lines[5:] == ["0 problems"]


def test_every_problem_is_listed(bottles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = bottles / "bottle/test/crack/tile_21.png"
    shutil.copy(bottles / "bottle/test/crack/tile_20.png", bare)
    Image.new("L", (96, 96), 0).save(bottles / "cable/ground_truth/crack/tile_20_mask.png")
    cut = bottles / "cable/train/good/tile_1.png"
    cut.write_bytes(cut.read_bytes()[:200])
    assert check(bottles, "--workers", "2") == 1
    lines = capsys.readouterr().out.splitlines()
    missing, broken, blank = lines[lines.index("3 problems:") + 1 :]
    assert "bottle/test/crack/tile_21.png is a defect without a mask: expected" in missing
    assert f"cannot read image {cut}" in broken
    assert "cable/test/crack/tile_20.png is a defect of kind 'crack' but nothing is marked" in blank
    assert check(bottles, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["dataset"], report["root"], report["images"]) == ("mvtec", str(bottles), 14)
    assert report["categories"]["cable"]["validation"] == {"normal": 1, "anomalous": 0}
    assert len(report["problems"]) == 3


def test_warnings_are_listed_and_are_no_problems(bottles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An inverted mask, and a notebook's checkpoints among the masks, which once passed for MVTec LOCO's layout."""
    truth = bottles / "bottle/ground_truth/crack/tile_20_mask.png"
    Image.open(truth).point(lambda value: 255 - value).save(truth)
    junk = bottles / "cable/ground_truth/crack/.ipynb_checkpoints/tile_20-checkpoint.png"
    junk.parent.mkdir()
    junk.write_bytes(truth.read_bytes())
    (bottles / "cable/ground_truth/Thumbs.db").touch()
    assert check(bottles) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("in the mvtec layout")
    assert lines[5:7] == ["0 problems", "2 warnings about files that can be used as they are:"]
    assert lines[7].startswith("  2 hidden or foreign files among the masks are ignored, such as ")
    assert lines[8].startswith(f"  mask {truth} marks 9")
    assert lines[8].endswith("is it inverted?")
    assert check(bottles, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["problems"], len(report["warnings"])) == ([], 2)


def test_a_category_without_masks_is_one_warning(bottles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(bottles / "cable/ground_truth")
    shutil.copy(bottles / "cable/test/crack/tile_20.png", bottles / "cable/test/crack/tile_21.png")
    assert check(bottles) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[5:] == [
        "0 problems",
        "1 warning about files that can be used as they are:",
        "  cable: no defect has a mask: there are image metrics, but no pixel metrics, and nothing to train on",
    ]


def test_files_that_the_index_leaves_out_are_problems(
    write_tiles: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiles("Real-IAD/realiad_256/cap/OK/S0001", range(2))
    for number, name in enumerate(("cap_0001_OK_C1_2023.jpg", "cap_0001_OK_2023.jpg")):
        (folder / f"tile_{number}.png").rename(folder / name)
    assert check(tmp_path / "Real-IAD") == 1
    out = capsys.readouterr().out
    assert "1 images name no view C1-C5" in out
    assert "cap_0001_OK_2023.jpg" in out
    assert ": 1 images in the realiad layout" in out


def test_columns_of_a_hugging_face_set(write_tiles: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiles("photos", range(2))
    (folder / "metadata.csv").write_text("file_name,state,region\ntile_0.png,fine,\ntile_1.png,good,\n")
    assert check(folder) == 2
    assert "has no label and no mask" in capsys.readouterr().err
    assert check(folder, "--columns.label", "state") == 0  # "fine" is taken for a defect, which has no mask
    assert "photos: no defect has a mask: there are image metrics" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--root", "absent"], "folder not found: absent"),
        (["--root", ".", "--dataset", "imagenet"], "data set 'imagenet' is unknown; choose one of: auto, realiad"),
        (["--root", "."], "is in none of the known layouts"),
        (["--root", ".", "--dataset", "folder", "--workers", "0"], "workers 0; expected at least 1"),
        ([], "root"),
    ],
)
def test_wrong_usage(
    arguments: list[str],
    message: str,
    write_tiles: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(write_tiles("plain", range(1)))
    assert main(["check-data", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_copied_training_image_among_those_to_test_on_is_a_problem(
    bottles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under another name and in another format; copies within a split are not."""
    train, test = bottles / "cable/train/good", bottles / "cable/test/good"
    Image.open(train / "tile_2.png").save(test / "leak.bmp")
    Image.open(train / "tile_1.png").save(train / "again.tif")
    assert check(bottles) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "copy" in line]
    # The tiles of the two categories are drawn from the same seeds: bottle's come first.
    assert any(f"{test / 'leak.bmp'} (test) is a copy of the training image" in line for line in lines)
    assert not any("again.tif" in line for line in lines)
