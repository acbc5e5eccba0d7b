"""AD 2, LOCO, 3D, VisA, BTAD and MPDD in tiny trees of their true form: splits, masks, traps, errors, detection."""

import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pytest
from pictures import mask, photograph
from PIL import Image

from adpretrain.data import DATASETS, ImageDataset, Junk, LeftOut, MissingMasks, Sample, detect_layout, index_dataset
from adpretrain.data.layouts.mvtec import index_mvtec
from adpretrain.data.layouts.visa import index_visa
from adpretrain.preprocess import Preprocess

NAMES = ("mpdd", "mvtec_ad_2", "mvtec_loco", "mvtec_3d", "btad", "visa")


@pytest.fixture
def trees(mpdd: Path, mvtec_ad_2: Path, loco: Path, mvtec_3d: Path, btad: Path, visa: Path) -> dict[str, Path]:
    return dict(zip(NAMES, (mpdd, mvtec_ad_2, loco, mvtec_3d, btad, visa), strict=True))


def counts(samples: list[Sample]) -> dict[tuple[str, str, str], int]:
    return dict(Counter((s.category, s.split, s.defect) for s in samples))


def marked(samples: list[Sample]) -> list[float]:
    """Marked pixels of every anomalous sample, in pixels of the 12 x 8 photographs."""
    preprocess = Preprocess(24)
    items = ImageDataset([s for s in samples if s.anomalous], preprocess)
    return [int(items[i]["mask"].sum()) / 6 for i in range(len(items))]  # 2 x 3 pixels are one of the file's


def test_mpdd(mpdd: Path) -> None:
    samples = index_dataset("mpdd", mpdd)
    assert counts(samples) == {
        ("bracket_black", "train", "good"): 2,
        ("bracket_black", "test", "good"): 1,
        ("bracket_black", "test", "hole"): 1,
    }
    assert samples == index_mvtec(mpdd)
    assert samples[-1].mask == mpdd / "bracket_black/ground_truth/hole/000_mask.PNG"
    assert marked(samples) == [16]


def test_masks_named_like_their_image_are_found_too(mpdd: Path) -> None:
    (mpdd / "bracket_black/ground_truth/hole/000_mask.PNG").unlink()
    own = mask(mpdd / "bracket_black/ground_truth/hole/000.png")
    assert index_mvtec(mpdd)[-1].mask == own


def test_ad_2_takes_the_public_test_images_only(mvtec_ad_2: Path) -> None:
    with pytest.warns(Junk, match="1 hidden or foreign files among the masks"):
        samples = index_dataset("mvtec_ad_2", mvtec_ad_2)
    assert counts(samples) == {
        ("fruit_jelly", "train", "good"): 2,
        ("fruit_jelly", "validation", "good"): 1,
        ("fruit_jelly", "test", "bad"): 2,
        ("fruit_jelly", "test", "good"): 2,
    }
    assert not any("private" in part for s in samples for part in s.image.parts[-3:])
    assert [s.mask.name for s in samples if s.mask] == ["000_regular_mask.png", "000_shift_1_mask.png"]
    assert marked(samples) == [16, 16]
    shutil.rmtree(mvtec_ad_2 / "fruit_jelly/test_public")
    with pytest.raises(ValueError, match=r"not in the MVTec AD 2 layout: expected \{category\}/test_public/good"):
        index_dataset("mvtec_ad_2", mvtec_ad_2)


def test_loco_merges_its_masks_and_keeps_validation_apart(loco: Path) -> None:
    samples = index_dataset("mvtec_loco", loco)
    assert counts(samples) == {
        ("breakfast_box", "train", "good"): 2,
        ("breakfast_box", "validation", "good"): 1,
        ("breakfast_box", "test", "good"): 1,
        ("breakfast_box", "test", "logical_anomalies"): 2,
        ("breakfast_box", "test", "structural_anomalies"): 2,
    }
    assert marked(samples) == [32, 16, 32, 16]
    first = next(s for s in samples if s.anomalous)
    folder = loco / "breakfast_box/ground_truth/logical_anomalies/000"
    assert first.mask == first.mask_files == (folder / "000.png", folder / "001.png")
    union = ImageDataset([first], Preprocess(24))[0]["mask"].numpy()
    expected = np.zeros((24, 24), bool)
    expected[:12, :8] = expected[12:, 16:] = True  # the two boxes of the fixture, 12 x 8 pixels stretched to 24 x 24
    assert np.array_equal(union, expected)


def test_one_loco_mask_of_another_size_is_named(loco: Path) -> None:
    second = loco / "breakfast_box/ground_truth/logical_anomalies/000/001.png"
    Image.new("L", (8, 12), 255).save(second)
    samples = [s for s in index_dataset("mvtec_loco", loco) if s.anomalous]
    with pytest.raises(ValueError, match=r"mask .*logical_anomalies/000/001\.png is 8x12 but its image"):
        ImageDataset(samples, Preprocess(24))[0]


def test_mvtec_3d_takes_photographs_only(mvtec_3d: Path) -> None:
    samples = index_dataset("mvtec_3d", mvtec_3d)
    assert counts(samples) == {
        ("bagel", "train", "good"): 2,
        ("bagel", "validation", "good"): 2,
        ("bagel", "test", "crack"): 2,
        ("bagel", "test", "good"): 2,
    }
    assert {s.image.parent.name for s in samples} == {"rgb"}
    assert {s.mask for s in samples if s.anomalous} == {
        mvtec_3d / f"bagel/test/crack/gt/{n}.png" for n in ("000", "001")
    }
    assert {s.mask for s in samples if not s.anomalous} == {None}
    assert marked(samples) == [16, 16]


def test_btad_finds_masks_of_either_suffix(btad: Path) -> None:
    samples = index_dataset("btad", btad)
    assert counts(samples) == {
        (category, split, defect): count
        for category in ("01", "02", "03")
        for split, defect, count in (("train", "good", 2), ("test", "good", 1), ("test", "ko", 1))
    }
    masks = {s.category: s.mask for s in samples if s.anomalous}
    assert [masks[c].suffix for c in ("01", "02", "03")] == [".png", ".png", ".bmp"]
    assert marked(samples) == [16, 16, 16]  # the value 1 marks as 255 does


def test_visa(visa: Path) -> None:
    samples = index_dataset("visa", visa)
    candle = visa / "candle/Data"
    assert samples == [
        Sample(candle / "Images/Normal/0000.JPG", None, "candle", "good", None, "train"),
        Sample(candle / "Images/Normal/0001.JPG", None, "candle", "good", None, "test"),
        Sample(candle / "Images/Anomaly/000.JPG", candle / "Masks/Anomaly/000.png", "candle", "anomaly", None, "test"),
        Sample(visa / "pcb1/Data/Images/Normal/0000.JPG", None, "pcb1", "good", None, "train"),
    ]
    assert marked(samples) == [16]
    assert index_visa(visa, ["pcb1"]) == samples[3:]


def test_visa_other_split_files(visa: Path) -> None:
    line = "candle,train,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.png\r\n"
    text = "\ufeffobject,split,label,image,mask\r\n" + line  # as spreadsheet programs write it
    (visa / "split_csv/2cls_fewshot.csv").write_bytes(text.encode())
    assert [(s.split, s.defect) for s in index_visa(visa, protocol="2cls_fewshot")] == [("train", "anomaly")]
    with pytest.raises(ValueError, match=r"2cls\.csv; split files present: 1cls, 2cls_fewshot"):
        index_visa(visa, protocol="2cls")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("candle,test,normal", "candle,val,normal", "split 'val' in line 3 of 1cls.csv is unknown; valid: train"),
        ("candle,test,anomaly", "candle,test,bad", "label 'bad' in line 4 of 1cls.csv is unknown; valid: normal, ano"),
        ("label,image", "kind,image", r"lacks the columns label; columns found: object, split, kind, image, mask"),
        ("candle/Data/Images/Normal/0001.JPG", "../secret.JPG", r"path '\.\./secret.JPG' in line 3 .* leaves .*VisA"),
        ("candle/Data/Images/Normal/0001.JPG", "/etc/passwd", "path '/etc/passwd' in line 3 of 1cls.csv leaves"),
        ("candle/Data/Masks/Anomaly/000.png", "candle/../../m.png", "path 'candle/../../m.png' in line 4 .* leaves"),
    ],
)
def test_a_wrong_visa_line_is_named(rewrite_visa: Callable[[str, str], Path], old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        index_visa(rewrite_visa(old, new))


def test_a_link_out_of_visa_is_refused(visa: Path, tmp_path: Path) -> None:
    image = visa / "candle/Data/Images/Normal/0001.JPG"
    image.unlink()
    image.symlink_to(photograph(tmp_path / "secret.jpg"))
    with pytest.raises(ValueError, match=r"0001\.JPG' in line 3 of 1cls\.csv leaves"):
        index_visa(visa)


def test_a_linked_root_is_no_way_out(visa: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(visa, target_is_directory=True)
    assert len(index_dataset("auto", tmp_path / "link")) == 4


def test_an_empty_visa_listing(visa: Path) -> None:
    (visa / "split_csv/1cls.csv").write_text("object,split,label,image,mask\n")
    with pytest.raises(ValueError, match=r"1cls\.csv lists no images"):
        index_visa(visa)


@pytest.mark.parametrize(
    ("name", "bare", "expected"),
    [
        ("mpdd", "bracket_black/test/hole/001.png", "ground_truth/hole/001_mask.png"),
        (
            "mvtec_ad_2",
            "fruit_jelly/test_public/bad/002_regular.png",
            "ground_truth/bad/002_regular_mask.png",
        ),
        ("mvtec_3d", "bagel/test/crack/rgb/002.png", "test/crack/gt/002.png"),
        ("btad", "03/test/ko/0001.bmp", r"ground_truth/ko/0001.png \(or .bmp\)"),
        ("visa", "candle/Data/Images/Anomaly/001.JPG", "candle/Data/Masks/Anomaly/001.png"),
        ("mvtec_loco", "breakfast_box/test/logical_anomalies/002.png", r"logical_anomalies/002/\*.png"),
    ],
)
def test_a_missing_mask_is_named_and_the_set_is_still_there(
    trees: dict[str, Path], name: str, bare: str, expected: str
) -> None:
    """Beside other defects of the category that have theirs."""
    root = trees[name]
    whole = index_dataset(name, root)
    photograph(root / bare)
    if name == "visa":
        with (root / "split_csv/1cls.csv").open("a") as listing:
            listing.write(f"candle,test,anomaly,{bare},candle/Data/Masks/Anomaly/001.png\n")
    with pytest.raises(MissingMasks, match=f"is a defect without a mask: expected .*{expected}") as caught:
        index_dataset(name, root)
    assert {s.image for s in caught.value.samples} == {*(s.image for s in whole), root / bare}
    assert [s.image for s in caught.value.samples if s.anomalous and s.mask is None] == list(caught.value.missing)
    assert list(caught.value.missing) == [root / bare]


@pytest.mark.parametrize("name", NAMES)
def test_a_set_without_masks_has_its_defects_all_the_same(trees: dict[str, Path], name: str) -> None:
    whole = index_dataset(name, trees[name])
    for file in [file for sample in whole for file in sample.mask_files]:
        file.unlink()
    assert index_dataset(name, trees[name]) == [replace(sample, mask=None) for sample in whole]


def test_many_missing_masks_are_counted(mvtec_3d: Path) -> None:
    for number in range(7):
        photograph(mvtec_3d / f"bagel/test/hole/rgb/{number:03d}.png")
    with pytest.raises(MissingMasks, match=r"and 2 more; `adpretrain check-data` lists all") as caught:
        index_dataset("mvtec_3d", mvtec_3d)
    assert len(caught.value.missing) == 7


# Detection


def test_auto_finds_every_layout_and_every_category_folder(trees: dict[str, Path]) -> None:
    for name, root in trees.items():
        found = "mvtec" if name == "mpdd" else name
        assert detect_layout(root) == found
        whole = index_dataset("auto", root)
        assert whole == index_dataset(name, root)
        category = whole[0].category
        assert detect_layout(root / category) == found
        alone = index_dataset("auto", root / category)
        assert [(s.image.resolve(), s.category) for s in alone] == [
            (s.image.resolve(), s.category) for s in whole if s.category == category
        ]


def test_a_category_folder_is_named_also_as_the_current_one(btad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(btad / "02")
    assert {s.category for s in index_dataset("auto", ".")} == {"02"}


def test_a_missing_mask_does_not_make_it_another_layout(mpdd: Path) -> None:
    photograph(mpdd / "bracket_black/test/hole/001.png")
    with pytest.raises(MissingMasks):
        index_dataset("auto", mpdd)
    shutil.rmtree(mpdd / "bracket_black/ground_truth")
    assert detect_layout(mpdd) == "mvtec"


def test_what_was_looked_for_and_the_folder_that_was_meant(btad: Path, tmp_path: Path) -> None:
    os.makedirs(tmp_path / "sets/inner")
    btad.rename(tmp_path / "sets/inner/BTAD")
    with pytest.raises(ValueError, match=r"(?s)btad: \*/train/ok or train/ok.*did you mean .*inner/BTAD \(btad\)\?"):
        detect_layout(tmp_path / "sets/inner")
    with pytest.raises(ValueError, match=r"(?s)mvtec_loco: .*visa|visa.*mvtec_loco: ") as caught:
        detect_layout(tmp_path / "sets")
    assert "did you mean" not in str(caught.value)
    for name in set(DATASETS) - {"mpdd", "folder"}:  # MPDD is in MVTec's layout, a plain folder in any
        assert f"  {name}: " in str(caught.value)
    with pytest.raises(ValueError, match=r"folder not found: .*absent"):
        detect_layout(tmp_path / "absent")


@pytest.mark.parametrize("name", ["mvtec", "mvtec_ad_2", "mvtec_loco", "mvtec_3d", "btad"])
def test_another_layout_is_refused_by_name(visa: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"VisA is not in the .* layout: expected \{category\}/t(rain|est_public)/"):
        index_dataset(name, visa)


@pytest.mark.parametrize("name", ["mvtec_ad_2", "mvtec_loco", "mvtec_3d", "btad", "visa"])
def test_categories_are_chosen_by_name(trees: dict[str, Path], name: str) -> None:
    samples = resolve_name(DATASETS[name])(trees[name])
    last = samples[-1].category
    assert resolve_name(DATASETS[name])(trees[name], [last]) == [s for s in samples if s.category == last]
    with pytest.raises(ValueError, match=rf"categories \['bagle'\] are not in .*found: .*{last}"):
        resolve_name(DATASETS[name])(trees[name], ["bagle"])


def test_a_tree_without_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cap/train/good").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no images in .*cap"):
        index_dataset("auto", tmp_path)


@pytest.mark.parametrize("what", ["no train/good", "no images"])
def test_an_incomplete_category_is_not_left_out_without_a_word(mpdd: Path, what: str) -> None:
    """As a copy leaves it that was stopped halfway: among complete ones, or asked for by name."""
    whole = index_mvtec(mpdd)
    folder = mpdd / "tubes"
    (folder / ("test/good" if what == "no train/good" else "train/good")).mkdir(parents=True)
    with pytest.warns(LeftOut, match=rf"1 categories are left out:\n  .*tubes: there (is|are) {what}"):
        assert index_dataset("auto", mpdd) == whole
    with pytest.raises(ValueError, match="tubes"):
        index_mvtec(mpdd, ["tubes"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert index_mvtec(mpdd, ["bracket_black"]) == whole
