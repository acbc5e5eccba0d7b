"""Plain folders, MVTec and Magnetic Tiles in tiny trees of their true form, and the real tiles where they lie."""

import importlib.util
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from pictures import write

from adpretrain.data import DATASETS, ImageDataset, Sample, detect_layout, index_dataset
from adpretrain.data.layouts.elpv import index_elpv
from adpretrain.data.layouts.folder import index_folder
from adpretrain.data.layouts.mtd import index_mtd
from adpretrain.data.layouts.mvtec import index_mvtec
from adpretrain.preprocess import Preprocess

REAL_MTD = Path(__file__).parents[3] / "shared" / "data" / "mtd"
ELPV_PACKAGE = importlib.util.find_spec("elpv_dataset")
REAL_ELPV = Path(os.environ.get("ELPV", Path(ELPV_PACKAGE.origin or "").parent / "data" if ELPV_PACKAGE else "absent"))


# Plain folders


def test_a_folder_is_walked_in_order_and_other_files_are_left(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "deep/er/c.tiff", ".hidden.png", ".checkpoints/e.png"):
        write(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "d.png").mkdir()
    samples = index_folder(tmp_path, split="train")
    assert [s.image.relative_to(tmp_path).as_posix() for s in samples] == ["a.JPG", "b.png", "deep/er/c.tiff"]
    assert {(s.category, s.defect, s.split, s.mask, s.view) for s in samples} == {
        (tmp_path.name, "good", "train", None, None)
    }
    assert {s.category for s in index_folder(tmp_path, category="cap")} == {"cap"}


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=rf"no images in {tmp_path} \(looked for .*\.png"):
        index_folder(tmp_path)
    with pytest.raises(ValueError, match=r"folder not found: .*absent"):
        index_folder(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"notes\.txt is a file, not a folder"):
        index_folder(tmp_path / "notes.txt")


def test_data_sets_have_names(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    assert index_dataset("folder", tmp_path) == index_folder(tmp_path)
    with pytest.raises(ValueError, match=f"'imagenet' is unknown; choose one of: auto, {', '.join(DATASETS)}"):
        index_dataset("imagenet", tmp_path)


def test_auto_finds_the_layout_and_explains_when_it_does_not(mvtec: Path, tmp_path: Path) -> None:
    assert index_dataset("auto", mvtec) == index_mvtec(mvtec)
    write(tmp_path / "mtd/MT_Free/Imgs/a.jpg")
    assert index_dataset("auto", tmp_path / "mtd") == index_mtd(tmp_path / "mtd")
    write(tmp_path / "plain/a.png")
    with pytest.raises(ValueError, match=r"(?s)none of the known layouts.*realiad: .*mvtec: .*mtd: "):
        index_dataset("auto", tmp_path / "plain")


# MVTec


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    root = tmp_path / "mvtec"
    for category in ("bottle", "cable"):
        for name in ("train/good/000.png", "train/good/001.png", "test/good/000.png", "test/crack/000.png"):
            write(root / category / name)
        write(root / category / "ground_truth/crack/000_mask.png", "L", 255)
        (root / category / "license.txt").touch()
        (root / category / "test" / "readme.txt").touch()
    (root / "readme.txt").touch()
    return root


def test_mvtec(mvtec: Path) -> None:
    samples = index_mvtec(mvtec)
    assert Counter((s.category, s.split, s.defect) for s in samples) == {
        (category, split, defect): count
        for category in ("bottle", "cable")
        for split, defect, count in (("train", "good", 2), ("test", "good", 1), ("test", "crack", 1))
    }
    for s in samples:
        if s.anomalous:
            assert s.mask == mvtec / s.category / "ground_truth/crack/000_mask.png"
            assert s.image == mvtec / s.category / "test/crack/000.png"
        else:
            assert s.mask is None
    assert index_mvtec(mvtec, ["cable"]) == [s for s in samples if s.category == "cable"]
    assert index_mvtec(mvtec / "cable") == index_mvtec(mvtec, ["cable"])
    assert sum(int(item["mask"].all()) for item in ImageDataset(samples, Preprocess(8))) == 2


def test_mvtec_errors(mvtec: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"categories \['bottel'\] are not in .*found: bottle, cable"):
        index_mvtec(mvtec, ["bottel"])
    with pytest.raises(ValueError, match=r"not in the MVTec layout: expected \{category\}/train/good"):
        index_mvtec(mvtec / "cable" / "test")
    write(mvtec / "cable/test/crack/001.png")
    with pytest.raises(ValueError, match=r"cable/test/crack/001\.png is a defect without a mask"):
        index_mvtec(mvtec)


# Magnetic tiles


def test_mtd_splits_normals_by_stride(tmp_path: Path) -> None:
    for index in range(11):
        write(tmp_path / f"MT_Free/Imgs/exp1_num_{index:03d}.jpg")
        write(tmp_path / f"MT_Free/Imgs/exp1_num_{index:03d}.png", "L")
    write(tmp_path / "MT_Crack/Imgs/x.jpg")
    write(tmp_path / "MT_Crack/Imgs/x.png", "L", 255)
    samples = index_mtd(tmp_path)
    assert [s.split for s in samples[:11]] == ["test" if i % 5 == 0 else "train" for i in range(11)]
    assert {(s.defect, s.mask) for s in samples[:11]} == {("good", None)}
    crack = Sample(tmp_path / "MT_Crack/Imgs/x.jpg", tmp_path / "MT_Crack/Imgs/x.png", "tile", "crack", None, "test")
    assert samples[11:] == [crack]
    bare = write(tmp_path / "MT_Crack/Imgs/y.jpg")
    with pytest.raises(ValueError, match=r"y\.jpg is a defect without a mask: expected .*y\.png"):
        index_mtd(tmp_path)
    crack.mask.unlink()
    assert index_mtd(tmp_path)[11:] == [replace(crack, mask=None), replace(crack, image=bare, mask=None)]
    with pytest.raises(ValueError, match="is not the Magnetic Tile set: expected MT_Free/Imgs"):
        index_mtd(tmp_path / "MT_Crack")


@pytest.mark.skipif(not REAL_MTD.is_dir(), reason="the real Magnetic Tile set is not at ../shared/data/mtd")
def test_the_real_mtd_set() -> None:
    """Counts as published (952 + 392 = 1,344 images), and every defect has marked pixels, every size fits."""
    samples = index_mtd(REAL_MTD)
    assert Counter(s.defect for s in samples) == {
        "good": 952,
        "blowhole": 115,
        "break": 85,
        "crack": 57,
        "fray": 32,
        "uneven": 103,
    }
    normals = [s for s in samples if not s.anomalous]
    assert Counter(s.split for s in normals) == {"test": 191, "train": 761}
    assert {s.split for s in samples if s.anomalous} == {"test"}
    few = [s for s in samples if s.anomalous][::28] + normals[::200]
    items = list(ImageDataset(few, Preprocess(224)))
    assert all(bool(item["mask"].any()) == bool(item["label"]) for item in items)
    assert all(0 < item["image"].mean() < 1 for item in items)


# Solar cells


@pytest.fixture
def elpv(tmp_path: Path) -> Path:
    """Eleven good cells of poly and one of mono, a defective one of each, two that the experts were not sure of."""
    lines = [f"images/cell{number:04}.png  0.0                 poly" for number in range(1, 12)]
    lines += ["images/cell0012.png  0.0                 mono", "images/cell0013.png  1.0                 mono"]
    lines += ["images/cell0014.png  0.3333333333333333  poly", "images/cell0015.png  0.6666666666666666  mono"]
    lines += ["images/cell0016.png  1.0                 poly"]
    for line in lines:
        write(tmp_path / line.split()[0])
    (tmp_path / "labels.csv").write_text("\n".join([*lines[11:], *lines[:11], ""]))  # the order is that of the names
    return tmp_path


def test_elpv(elpv: Path) -> None:
    samples = index_elpv(elpv)
    assert detect_layout(elpv) == "elpv"
    assert samples == index_dataset("auto", elpv)
    found = [(s.image.stem[-2:], s.category, s.defect, s.split) for s in samples]
    poly = [(f"{n:02}", "poly", "good", "train" if n % 5 != 1 else "test") for n in range(1, 12)]
    mono = [("12", "mono", "good", "test"), ("13", "mono", "defective", "test")]
    assert found == [*poly, *mono, ("16", "poly", "defective", "test")]
    assert {(s.mask, s.view) for s in samples} == {(None, None)}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/cell0001.png 0.0", "line 1 of .*labels.csv is 'images/cell0001.png 0.0'; expected an image, a prob"),
        ("images/cell0001.png high mono", "expected an image, a probability from 0 to 1, and mono or poly"),
        ("images/cell0001.png 1.5 mono", "1.5 mono'; expected"),
        ("images/cell0001.png 1.0 wafer", "wafer'; expected"),
        ("../cell0001.png 1.0 mono", r"path '\.\./cell0001.png' in line 1 of .* leaves"),
        ("images/cell0001.png 0.3333 mono", "lists no image with the probability 0 or 1"),
    ],
)
def test_a_wrong_elpv_line_is_named(elpv: Path, line: str, message: str) -> None:
    (elpv / "labels.csv").write_text(line)
    with pytest.raises(ValueError, match=message):
        index_elpv(elpv)


def test_elpv_is_labels_and_images(elpv: Path) -> None:
    with pytest.raises(ValueError, match=r"is not the ELPV set: expected labels\.csv and images/ in it"):
        index_elpv(elpv / "images")


@pytest.mark.skipif(not REAL_ELPV.is_dir(), reason="elpv-dataset is not installed, nor its folder data named by $ELPV")
def test_the_real_elpv_set() -> None:
    """Counts of labels.csv: 588 + 920 good cells, every 5th to test, and 313 + 402 defective ones; 401 are left out."""
    samples = index_dataset("auto", REAL_ELPV)
    assert Counter((s.category, s.split, s.defect) for s in samples) == {
        ("mono", "train", "good"): 470,
        ("mono", "test", "good"): 118,
        ("mono", "test", "defective"): 313,
        ("poly", "train", "good"): 736,
        ("poly", "test", "good"): 184,
        ("poly", "test", "defective"): 402,
    }
    assert all(s.image.is_file() for s in samples)
