"""Real-IAD in a tiny tree of its true form: views, masks, JSON splits, resolutions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pictures import write

from adpretrain.data import ImageDataset, LeftOut, Sample, index_dataset
from adpretrain.data.layouts.realiad import index_realiad, index_realiad_variety, view_of
from adpretrain.data.products import normals
from adpretrain.preprocess import Preprocess
from adpretrain.training.dataset import PretrainingSet


def by_name(samples: list[Sample]) -> dict[str, Sample]:
    return {sample.image.name: sample for sample in samples}


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
    assert index_dataset("auto", realiad) == index_realiad(realiad)
    assert len(samples) == 8
    found = by_name(samples)
    folder = realiad / "realiad_256/cap/NG/HS/S0002"
    first, second, third = (found[f"cap_0002_NG_HS_C{view}_20231021.jpg"] for view in (1, 2, 3))
    assert first == Sample(
        folder / "cap_0002_NG_HS_C1_20231021.jpg", folder / "cap_0002_NG_HS_C1_20231021.png", "cap", "HS", "C1", "train"
    )
    assert (second.defect, second.mask.name) == ("HS", "cap_0002_NG_HS_C2_20231021_mask.png")
    assert (third.defect, third.mask, third.view) == ("good", None, "C3")  # a view that does not show the defect
    assert [s.of_defective_part for s in (first, second, third)] == [False, False, True]
    normal = [s for s in samples if "_OK_" in s.image.name]
    assert [s.view for s in normal] == ["C1", "C2", "C3", "C4", "C5"]
    assert {(s.defect, s.mask) for s in normal} == {("good", None)}
    assert {s.category for s in index_realiad(realiad)} == {"cap", "zipper"}
    assert {s.view for s in index_realiad(realiad, views=["C2"])} == {"C2"}


@pytest.mark.parametrize("protocol", ["", "realiad_jsons_sv"])
def test_without_a_single_mask_nothing_tells_a_defective_parts_views_apart(realiad: Path, protocol: str) -> None:
    """In the folders, that is; a listing still does, and the masks that it names are not there to be read."""
    (realiad / "realiad_256/cap/NG/HS/.ipynb_checkpoints").mkdir()
    for file in realiad.rglob("cap*.png"):
        file.unlink()
    samples = index_realiad(realiad, protocol=protocol)
    assert all(s.mask is None for s in samples if s.category == "cap")
    views = [(s.view, s.of_defective_part) for s in samples if s.category == "cap" and s.defect == "HS"]
    assert views == ([("C1", False)] if protocol else [("C1", False), ("C2", False), ("C3", False)])
    assert [s.view for s in samples if s.category == "zipper" and s.of_defective_part] == ["C3"]


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
    assert all(item["label"] == int(item["mask"].all()) for item in ImageDataset(samples, Preprocess(8)))


@pytest.mark.parametrize("protocol", ["", "realiad_jsons_sv"])
def test_unmarked_views_of_defective_parts_are_not_pretrained_on(realiad: Path, protocol: str) -> None:
    """Neither as images nor as references: of view C3 the part S0001 alone is good."""
    samples = index_realiad(realiad, ["cap"], protocol=protocol)
    assert [s.view for s in samples if s.of_defective_part] == ["C3"]
    more = [replace(s, image=s.image.with_name(f"more-{s.image.name}")) for s in samples]
    data = PretrainingSet([*samples, *more], Preprocess(8), [1], seed=0)
    assert len(data) == 2 * (len(samples) - 1)
    assert not any(s.of_defective_part for s in data.samples)
    drawn = {i for index in range(len(data)) for epoch in range(9) for i in data.draw_references(index, epoch)}
    assert drawn
    assert all("_OK_" in data.samples[i].image.name for i in drawn)


def test_a_contaminated_training_list_keeps_its_labels(realiad: Path) -> None:
    """As in realiad_jsons_fuiad_0.4: marked defects and unmarked views of defective parts among the training images."""
    clean = realiad / "realiad_jsons/realiad_jsons_sv/cap.json"
    content = json.loads(clean.read_text())
    name = "NG/HS/S0002/cap_0002_NG_HS_C"
    content["test"] = content["test"][:1]
    content["train"] += [
        realiad_entry("HS", f"{name}1_20231021.jpg", f"{name}1_20231021.png"),
        realiad_entry("OK", f"{name}3_20231021.jpg", None),  # the set's own lists call these views OK
    ]
    listing = realiad / "realiad_jsons/realiad_jsons_fuiad_0.4/cap.json"
    listing.parent.mkdir()
    listing.write_text(json.dumps(content))
    assert not any(s.noise for s in index_realiad(realiad, protocol="realiad_jsons_sv"))
    samples = index_realiad(realiad, ["cap"], protocol="realiad_jsons_fuiad_0.4")
    assert [(s.split, s.defect, s.of_defective_part, s.noise) for s in samples] == [
        ("train", "good", False, False),
        ("train", "good", False, False),
        ("train", "HS", False, True),
        ("train", "good", True, True),
        ("test", "good", False, False),
    ]
    assert [samples[index].view for index in normals(samples)] == ["C1", "C2"]  # unless the noise is asked for
    assert samples[2].mask is not None


@pytest.fixture
def variety(tmp_path: Path) -> Path:
    """One OK part and a defective one, all .png, in a folder inside its own as unpacked, and a list without meta."""
    root = tmp_path / "Real-IAD_Variety"
    parts = root / "realiadvariety_raw/audio_jack_socket/audio_jack_socket"
    for view in (1, 2):
        write(parts / f"OK/S0001/audio_jack_socket_0001_OK_C{view}_20240101.png")
        write(parts / f"NG/Scratch/S0002/audio_jack_socket_0002_NG_Scratch_C{view}_20240101.png")
    marked = "NG/Scratch/S0002/audio_jack_socket_0002_NG_Scratch_C1_20240101"
    write(parts / f"{marked}_mask.png", "L", 255)
    entry = [realiad_entry("OK", f"OK/S0001/audio_jack_socket_0001_OK_C{v}_20240101.png", None) for v in (1, 2)]
    content = {"train": entry[:1], "test": [entry[1], realiad_entry("Scratch", f"{marked}.png", f"{marked}_mask.png")]}
    listing = root / "realiadvariety_jsons/Real-IAD_Variety_jsons/audio_jack_socket.json"
    listing.parent.mkdir(parents=True)
    listing.write_text(json.dumps(content))
    return root


def test_variety_tells_photographs_from_masks_by_name(variety: Path) -> None:
    samples = index_dataset("auto", variety)
    assert samples == index_realiad_variety(variety)
    assert [(s.view, s.defect, s.of_defective_part, s.split) for s in samples] == [
        ("C1", "good", False, "train"),
        ("C2", "good", False, "train"),
        ("C1", "Scratch", False, "train"),
        ("C2", "good", True, "train"),
    ]
    assert {s.category for s in samples} == {"audio_jack_socket"}
    assert [item["label"] == int(item["mask"].all()) for item in ImageDataset(samples, Preprocess(8))] == [True] * 4


def test_variety_is_read_by_its_own_lists(variety: Path) -> None:
    samples = index_dataset("auto", variety, split="Real-IAD_Variety_jsons")
    assert [(s.view, s.defect, s.split, s.image.is_file()) for s in samples] == [
        ("C1", "good", "train", True),
        ("C2", "good", "test", True),
        ("C1", "Scratch", "test", True),
    ]
    assert samples[2].mask is not None
    assert samples[2].mask.is_file()
    with pytest.raises(ValueError, match=r"realiad_jsons/audio_jack_socket\.json.*present: Real-IAD_Variety_jsons"):
        index_realiad_variety(variety, protocol="realiad_jsons")
    with pytest.raises(ValueError, match=r"no realiadvariety_\{256,512,1024,raw\} folder in"):
        index_realiad_variety(variety / "realiadvariety_jsons")
    with pytest.raises(ValueError, match=r"no realiad_\{256,512,1024,raw\} folder in"):
        index_realiad(variety)


def test_a_set_is_read_by_its_own_split(realiad: Path, visa: Path, mpdd: Path) -> None:
    samples = index_dataset("auto", realiad, split="realiad_jsons_sv")
    assert samples == index_realiad(realiad, protocol="realiad_jsons_sv")
    assert {s.split for s in samples} == {"train", "test"}
    assert [s.of_defective_part for s in samples[:5]] == [False, False, False, False, True]
    (visa / "split_csv/1cls.csv").rename(visa / "split_csv/2cls_fewshot.csv")
    assert {s.category for s in index_dataset("visa", visa, split="2cls_fewshot")} == {"candle", "pcb1"}
    with pytest.raises(ValueError, match=r"split file not found: .*protocols present: realiad_jsons_sv"):
        index_dataset("realiad", realiad, split="realiad_jsons")
    with pytest.raises(ValueError, match=r"split '1cls': .*MPDD is read as 'mvtec'.*exist for realiad \(such as"):
        index_dataset("auto", mpdd, split="1cls")


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
    with pytest.raises(ValueError, match=r"cap\.json"):
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
