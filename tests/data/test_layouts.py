"""Every layout in a tiny tree of its true form, its errors, and the real Magnetic Tile set where it lies."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adpretrain.data import DATASETS, ImageDataset, LeftOut, Sample, index_dataset
from adpretrain.data.folder import index_folder
from adpretrain.data.mtd import index_mtd
from adpretrain.data.mvtec import index_mvtec
from adpretrain.data.realiad import index_realiad, view_of
from adpretrain.preprocess import Preprocess

REAL_MTD = Path(__file__).parents[3] / "shared" / "data" / "mtd"


def write(path: Path, mode: str = "RGB", value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 8), value).save(path)
    return path


def by_name(samples: list[Sample]) -> dict[str, Sample]:
    return {sample.image.name: sample for sample in samples}


# Plain folders


def test_a_folder_is_walked_in_order_and_other_files_are_left(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "deep/er/c.tiff", ".hidden.png"):
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


def test_auto_finds_the_layout_and_explains_when_it_does_not(mvtec: Path, realiad: Path, tmp_path: Path) -> None:
    assert index_dataset("auto", mvtec) == index_mvtec(mvtec)
    assert index_dataset("auto", realiad) == index_realiad(realiad)
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
    assert sum(int(item["mask"].all()) for item in ImageDataset(samples, Preprocess(8, 8))) == 2


def test_mvtec_errors(mvtec: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"categories \['bottel'\] are not in .*found: bottle, cable"):
        index_mvtec(mvtec, ["bottel"])
    with pytest.raises(ValueError, match=r"not in the MVTec layout: expected \{category\}/train/good"):
        index_mvtec(mvtec / "cable" / "test")
    (mvtec / "cable/ground_truth/crack/000_mask.png").unlink()
    with pytest.raises(ValueError, match=r"cable/test/crack/000\.png is a defect without a mask"):
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
    crack.mask.unlink()
    with pytest.raises(ValueError, match=r"x\.jpg is a defect without a mask: expected .*x\.png"):
        index_mtd(tmp_path)
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
    items = list(ImageDataset(few, Preprocess(224, 224)))
    assert all(bool(item["mask"].any()) == bool(item["label"]) for item in items)
    assert all(0 < item["image"].mean() < 1 for item in items)


# Real-IAD


def realiad_entry(kind: str, image: str, mask: str | None, category: str = "cap") -> dict[str, Any]:
    return {"category": category, "anomaly_class": kind, "image_path": image, "mask_path": mask}


@pytest.fixture
def realiad(tmp_path: Path) -> Path:
    """One OK part and three defective views (mask, `_mask`, none) of each of two categories, and a JSON split."""
    root = tmp_path / "Real-IAD"
    for category in ("cap", "zipper"):
        folder = root / "realiad_256" / category
        for view in range(1, 6):
            write(folder / f"OK/S0001/{category}_0001_OK_C{view}_20231020.jpg")
        name = f"NG/HS/S0002/{category}_0002_NG_HS_C"
        for view in (1, 2, 3):
            write(folder / f"{name}{view}_20231021.jpg")
        write(folder / f"{name}1_20231021.png", "L", 255)
        write(folder / f"{name}2_20231021_mask.png", "L", 255)
        content = {
            "meta": {"normal_class": "OK", "prefix": f"{category}/"},
            "train": [
                realiad_entry("OK", f"OK/S0001/{category}_0001_OK_C{view}_20231020.jpg", None) for view in (1, 2)
            ],
            "test": [
                realiad_entry("OK", f"OK/S0001/{category}_0001_OK_C3_20231020.jpg", None),
                realiad_entry("HS", f"{name}1_20231021.jpg", f"{name}1_20231021.png"),
                realiad_entry("HS", f"{name}3_20231021.jpg", None),
            ],
        }
        listing = root / "realiad_jsons" / "realiad_jsons_sv" / f"{category}.json"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text(json.dumps(content))
    return root


def test_realiad_folders(realiad: Path) -> None:
    samples = index_realiad(realiad, ["cap"])
    assert len(samples) == 8
    found = by_name(samples)
    folder = realiad / "realiad_256/cap/NG/HS/S0002"
    first, second, third = (found[f"cap_0002_NG_HS_C{view}_20231021.jpg"] for view in (1, 2, 3))
    assert first == Sample(
        folder / "cap_0002_NG_HS_C1_20231021.jpg", folder / "cap_0002_NG_HS_C1_20231021.png", "cap", "HS", "C1", "train"
    )
    assert (second.defect, second.mask.name) == ("HS", "cap_0002_NG_HS_C2_20231021_mask.png")
    assert (third.defect, third.mask, third.view) == ("good", None, "C3")  # a view that does not show the defect
    normal = [s for s in samples if "_OK_" in s.image.name]
    assert [s.view for s in normal] == ["C1", "C2", "C3", "C4", "C5"]
    assert {(s.defect, s.mask) for s in normal} == {("good", None)}
    assert {s.category for s in index_realiad(realiad)} == {"cap", "zipper"}
    assert {s.view for s in index_realiad(realiad, views=["C2"])} == {"C2"}


def test_realiad_json_splits(realiad: Path) -> None:
    samples = index_realiad(realiad, ["cap"], protocol="realiad_jsons_sv")
    assert [(s.split, s.defect, s.view, s.mask is None) for s in samples] == [
        ("train", "good", "C1", True),
        ("train", "good", "C2", True),
        ("test", "good", "C3", True),
        ("test", "HS", "C1", False),
        ("test", "good", "C3", True),
    ]
    assert all(s.image.is_file() and (s.mask is None or s.mask.is_file()) for s in samples)
    assert all(item["label"] == int(item["mask"].all()) for item in ImageDataset(samples, Preprocess(8, 8)))


def test_realiad_resolutions(realiad: Path) -> None:
    write(realiad / "realiad_1024/cap/OK/S0001/cap_0001_OK_C1_20231020.jpg")
    assert all(s.image.is_relative_to(realiad / "realiad_256") for s in index_realiad(realiad))
    (only,) = index_realiad(realiad, resolution="1024")
    assert only.image.is_relative_to(realiad / "realiad_1024")
    with pytest.raises(ValueError, match=r"resolution '512' is not in .*present: 256, 1024"):
        index_realiad(realiad, resolution="512")


def test_realiad_files_without_a_view_are_named(realiad: Path) -> None:
    folder = realiad / "realiad_256/cap"
    lost = [write(folder / "OK/S0001/cap_0001_OK_20231020.jpg"), write(folder / "NG/HS/S0002/cap_0002_NG_HS_C6_1.jpg")]
    with pytest.warns(LeftOut, match=r"2 images name no view C1-C5 and are left out:") as caught:
        samples = index_realiad(realiad, ["cap"])
    assert all(str(file) in str(caught[0].message) for file in lost)
    assert len(samples) == 8
    listing = realiad / "realiad_jsons/realiad_jsons_sv/cap.json"
    listing.write_text(listing.read_text().replace("cap_0001_OK_C1_20231020", "cap_0001_OK_20231020"))
    with pytest.warns(LeftOut, match=r"1 images .*\n  .*cap_0001_OK_20231020\.jpg"):
        assert len(index_realiad(realiad, ["cap"], protocol="realiad_jsons_sv")) == 4


def test_realiad_masks_with_capital_suffixes_are_no_photographs(realiad: Path) -> None:
    before = index_realiad(realiad, ["cap"])
    folder = realiad / "realiad_256/cap/NG/HS/S0002"
    for mask in sorted(folder.glob("*.png")):
        mask.rename(mask.with_suffix(".PNG"))
    after = index_realiad(realiad, ["cap"])
    assert [(s.image, s.defect) for s in after] == [(s.image, s.defect) for s in before]


def test_a_realiad_prefix_cannot_leave_the_set(realiad: Path) -> None:
    listing = realiad / "realiad_jsons/realiad_jsons_sv/cap.json"
    listing.write_text(listing.read_text().replace('"cap/"', '"../../elsewhere/"'))
    with pytest.raises(ValueError, match=r"path '\.\./\.\./elsewhere/' in the split of cap leaves"):
        index_realiad(realiad, ["cap"], protocol="realiad_jsons_sv")


@pytest.mark.parametrize("path", ["../../../secret.jpg", "/etc/passwd", "OK/../../../../secret.jpg"])
@pytest.mark.parametrize("key", ["image_path", "mask_path"])
def test_a_listing_cannot_leave_the_set(realiad: Path, path: str, key: str) -> None:
    listing = realiad / "realiad_jsons/realiad_jsons_sv/cap.json"
    content = json.loads(listing.read_text())
    content["test"][1][key] = path
    listing.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"path {path!r} in the split of cap leaves"):
        index_realiad(realiad, protocol="realiad_jsons_sv")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"meta": {"normal_class": "OK"}, "train": [{}], "test": []}'])
def test_a_broken_listing_is_named(realiad: Path, text: str) -> None:
    (realiad / "realiad_jsons/realiad_jsons_sv/cap.json").write_text(text)
    with pytest.raises(ValueError, match=r"cap\.json is not a Real-IAD split file"):
        index_realiad(realiad, protocol="realiad_jsons_sv")


def test_realiad_errors_name_what_exists(realiad: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"categories \['cup'\] are not in .*found: cap, zipper"):
        index_realiad(realiad, ["cup"])
    with pytest.raises(ValueError, match=r"split file not found: .*protocols present: realiad_jsons_sv"):
        index_realiad(realiad, protocol="realiad_jsons")
    with pytest.raises(ValueError, match=r"no realiad_\{256,512,1024,raw\} folder in"):
        index_realiad(realiad / "realiad_jsons")
    with pytest.raises(ValueError, match="Real-IAD folder not found"):
        index_realiad(tmp_path / "absent")
    (tmp_path / "empty" / "realiad_256").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no category in the Real-IAD layout"):
        index_realiad(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("toy_brick_0001_OK_C4_20231020.jpg", "C4"),
        ("usb_0002_NG_HS_C5_2023.jpg", "C5"),
        ("x_C6_2.jpg", None),
        ("a.jpg", None),
    ],
)
def test_views_come_from_names(name: str, view: str | None) -> None:
    assert view_of(Path(name)) == view
