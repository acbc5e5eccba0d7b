"""Hugging Face data sets made here and read back from every local form; no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from pictures import SIZE, mask, photograph
from PIL import Image

from adpretrain.data import ImageDataset, MissingMasks, Sample, detect_layout, index_dataset
from adpretrain.data.huggingface import index_hf
from adpretrain.photographs import read_image
from adpretrain.preprocess import Preprocess

LABELS = ClassLabel(names=["broken", "good"])  # alphabetical, as image folders make them: 0 is the defect


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is read from or written to the user's own caches, and nothing can reach the Hub."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", folder / "extracted")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def pixels(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8))


def truth(value: int = 255) -> Image.Image:
    found = Image.new("L", SIZE, 0)
    found.paste(value, (0, 0, 4, 4))
    return found


def rows(first: int, split: str = "train", **renamed: str) -> Dataset:
    """Two normal images and a defect whose mask has the value 1, columns renamed as asked."""
    columns: dict[str, Any] = {
        "image": [pixels(first), pixels(first + 1), pixels(first + 2)],
        "mask": [None, None, truth(1)],
        "label": [1, 1, 0],
        "object": ["cap", "cap", "nut"],
    }
    features = {"image": datasets.Image(), "mask": datasets.Image(), "label": LABELS, "object": Value("string")}
    return Dataset.from_dict(columns, Features(features), split=split).rename_columns(renamed)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    parts = {name: rows(10 * number, name) for number, name in enumerate(("train", "validation", "test"))}
    DatasetDict(parts).save_to_disk(tmp_path / "caps")
    return tmp_path / "caps"


ROWS = [("cap", "good", False), ("cap", "good", False), ("nut", "broken", True)]


def shape(samples: list[Sample]) -> list[tuple[str, str, str, bool]]:
    return [(s.category, s.split, s.defect, s.mask is not None) for s in samples]


def expected(*splits: str) -> list[tuple[str, str, str, bool]]:
    return [(category, split, defect, has) for split in splits for category, defect, has in ROWS]


def same_pixels(samples: list[Sample], seeds: list[int]) -> bool:
    return all(np.array_equal(read_image(s.image), pixels(seed)) for s, seed in zip(samples, seeds, strict=True))


def test_a_saved_data_set(saved: Path, caches: Path) -> None:
    samples = index_dataset("auto", saved)
    assert shape(samples) == expected("train", "validation", "test")
    assert same_pixels(samples, [0, 1, 2, 10, 11, 12, 20, 21, 22])
    items = ImageDataset(samples, Preprocess(24))
    assert [int(items[i]["mask"].sum()) for i in range(3)] == [0, 0, 96]  # 4 x 4 of 12 x 8 pixels, stretched
    assert {s.image.suffix for s in samples} == {".png"}
    assert all(s.image.is_relative_to(caches / "adpretrain") for s in samples)


def test_images_are_written_once_under_their_content(saved: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    samples = index_hf(saved, cache=store)
    times = {path: path.stat().st_mtime_ns for path in store.rglob("*.png")}
    assert len(times) == 10  # nine photographs, and one mask that three rows share
    assert index_hf(saved, cache=store) == samples
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()} == times


def test_bytes_are_kept_as_they_are(tmp_path: Path) -> None:
    file = photograph(tmp_path / "photo.jpg")
    made = Dataset.from_dict({"image": [str(file)], "label": [0]}).cast_column("image", datasets.Image())
    made.save_to_disk(tmp_path / "one")
    (sample,) = index_hf(tmp_path / "one")
    assert sample.image.read_bytes() == file.read_bytes()
    assert (sample.image.suffix, sample.category, sample.split) == (".jpeg", "one", "train")


def test_a_lone_saved_split_keeps_its_name(tmp_path: Path) -> None:
    rows(0, "test").save_to_disk(tmp_path / "held")
    assert {s.split for s in index_dataset("hf", tmp_path / "held")} == {"test"}


def test_parquet_files(tmp_path: Path) -> None:
    folder = tmp_path / "caps/data"
    folder.mkdir(parents=True)
    rows(0).to_parquet(folder / "train-00000-of-00001.parquet")
    rows(10).to_parquet(folder / "test-00000-of-00001.parquet")
    assert detect_layout(tmp_path / "caps") == "hf"
    samples = index_dataset("auto", tmp_path / "caps")
    assert shape(samples) == expected("train", "test")
    assert same_pixels(samples, [0, 1, 2, 10, 11, 12])


def test_parquet_of_another_library(tmp_path: Path) -> None:
    """No features in the file's metadata: images are plain structs, or plain bytes, of unnamed type."""
    image, other = (photograph(tmp_path / f"{i}.png", i).read_bytes() for i in (1, 2))
    table = pa.table(
        {
            "img": [{"bytes": image, "path": "../../1.png"}, {"bytes": other, "path": None}],
            "ground_truth": pa.array([None, mask(tmp_path / "m.png").read_bytes()], pa.binary()),
            "is_anomalous": [False, True],
        }
    )
    (tmp_path / "set").mkdir()
    pq.write_table(table, tmp_path / "set/data.parquet")
    good, bad = index_dataset("auto", tmp_path / "set")
    assert (good.image.read_bytes(), good.defect, good.mask, good.category) == (image, "good", None, "set")
    assert (bad.image.read_bytes(), bad.defect) == (other, "anomaly")
    assert isinstance(bad.mask, Path)
    assert bad.mask.read_bytes() == (tmp_path / "m.png").read_bytes()


def test_a_row_cannot_name_a_file_of_the_computer(tmp_path: Path) -> None:
    secret = photograph(tmp_path / "secret.png")
    table = pa.table({"image": [{"bytes": None, "path": str(secret)}], "label": [0]})
    (tmp_path / "set").mkdir()
    pq.write_table(table, tmp_path / "set/data.parquet")
    with pytest.raises(ValueError, match=r"path '.*secret\.png' in row 0 of set/train leaves the data set"):
        index_dataset("hf", tmp_path / "set")


def test_subsets_are_categories(tmp_path: Path) -> None:
    root = tmp_path / "two"
    lines = []
    for number, name in enumerate(("bottle", "cable")):
        (root / name).mkdir(parents=True)
        rows(10 * number).remove_columns("object").to_parquet(root / name / "train.parquet")
        lines.append(f"- config_name: {name}\n  data_files: {name}/*.parquet\n")
    (root / "README.md").write_text("---\nconfigs:\n" + "".join(lines) + "---\n")
    samples = index_dataset("auto", root)
    assert [s.category for s in samples] == ["bottle"] * 3 + ["cable"] * 3
    assert same_pixels(samples, [0, 1, 2, 10, 11, 12])


# Columns and labels


def test_columns_are_named_when_they_cannot_be_guessed(tmp_path: Path) -> None:
    rows(0, image="shot", mask="area", label="state", object="part").save_to_disk(tmp_path / "set")
    with pytest.raises(
        ValueError, match=r"no column named image or img or photo.*; columns found: shot .image.*state \(int64"
    ):
        index_dataset("hf", tmp_path / "set")
    columns = {"image": "shot", "mask": "area", "label": "state", "category": "part"}
    assert shape(index_dataset("hf", tmp_path / "set", columns)) == expected("train")
    with pytest.raises(ValueError, match=r"columns \['shott'\] are not in set/train; columns found: shot"):
        index_dataset("hf", tmp_path / "set", {"image": "shott"})
    with pytest.raises(ValueError, match=r"columns \['picture'\] are unknown; name any of: image, mask, label"):
        index_dataset("hf", tmp_path / "set", {"picture": "shot"})
    with pytest.raises(ValueError, match=r"set/train has no label and no mask"):
        index_dataset("hf", tmp_path / "set", {"image": "shot"})
    with pytest.raises(ValueError, match="column 'part' of set/train holds no images but string"):
        index_dataset("hf", tmp_path / "set", {"image": "part", "label": "state"})


def test_without_labels_the_marked_pixels_decide(tmp_path: Path) -> None:
    made = Dataset.from_dict(
        {"Image": [pixels(0), pixels(1), pixels(2)], "Mask": [None, truth(0), truth(1)]},
        Features({"Image": datasets.Image(), "Mask": datasets.Image()}),
    )
    made.save_to_disk(tmp_path / "set")
    assert [s.defect for s in index_dataset("hf", tmp_path / "set")] == ["good", "good", "anomaly"]


@pytest.mark.parametrize(
    ("labels", "kinds"),
    [
        ([False, True], ["good", "anomaly"]),
        ([0, 1], ["good", "anomaly"]),
        ([0.0, 2.0], ["good", "anomaly"]),
        (["Normal", "dent "], ["good", "dent"]),
        (["OK", "1"], ["good", "anomaly"]),
    ],
)
def test_labels_of_every_kind(tmp_path: Path, labels: list[Any], kinds: list[str]) -> None:
    made = Dataset.from_dict({"image": [pixels(0), pixels(1)], "anomaly": labels})
    made.save_to_disk(tmp_path / "set")
    assert [s.defect for s in index_dataset("hf", tmp_path / "set")] == kinds


@pytest.mark.parametrize("label", [None, -1, float("nan")])
def test_a_label_that_says_nothing_is_named(tmp_path: Path, label: Any) -> None:
    Dataset.from_dict({"image": [pixels(0), pixels(1)], "label": [0, label]}).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=r"label .* in row 1 of set/train is neither normal nor anomalous"):
        index_dataset("hf", tmp_path / "set")


def test_labels_that_are_products_are_not_taken_for_defects(tmp_path: Path) -> None:
    made = Dataset.from_dict({"image": [pixels(0), pixels(1)], "label": ["bottle", "cable"]})
    made.save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=r"no image of .* is normal; labels found: bottle, cable"):
        index_dataset("hf", tmp_path / "set")


def test_a_split_column_and_an_unknown_split(tmp_path: Path) -> None:
    made = Dataset.from_dict({"image": [pixels(0), pixels(1)], "label": [0, 0], "split": ["val", "test"]})
    made.save_to_disk(tmp_path / "set")
    assert [s.split for s in index_dataset("hf", tmp_path / "set")] == ["validation", "test"]
    DatasetDict({"bottles": made}).save_to_disk(tmp_path / "odd")
    with pytest.raises(ValueError, match=r"split 'bottles' of .*odd is unknown; valid: train, training, valid"):
        index_dataset("hf", tmp_path / "odd")


def test_a_defect_without_a_mask_beside_masks_is_named(tmp_path: Path) -> None:
    made = Dataset.from_dict(
        {"image": [pixels(0), pixels(1), pixels(2)], "mask": [truth(), None, None], "label": [1, 1, 0]},
        Features({"image": datasets.Image(), "mask": datasets.Image(), "label": Value("int64")}),
    )
    made.save_to_disk(tmp_path / "set")
    with pytest.raises(MissingMasks, match="expected one in row 1 of set/train") as caught:
        index_dataset("hf", tmp_path / "set")
    assert [s.defect for s in caught.value.samples] == ["anomaly", "anomaly", "good"]
    assert [s.mask for s in index_dataset("hf", tmp_path / "set", {"mask": ""})] == [None, None, None]


def test_a_broken_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    table = pa.table({"image": pa.array([b"no image", None], pa.binary()), "label": [0, 0]})
    pq.write_table(table.slice(0, 1), tmp_path / "set/data.parquet")
    (sample,) = index_dataset("hf", tmp_path / "set")
    with pytest.raises(ValueError, match=r"cannot read image .*\.unknown"):
        ImageDataset([sample], Preprocess(8))[0]
    pq.write_table(table, tmp_path / "set/data.parquet")
    with pytest.raises(ValueError, match="row 1 of set/train has no image"):
        index_dataset("hf", tmp_path / "set")


# The Hub: the library's own loader is answered with files made here


def test_a_repository_is_asked_for_with_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    (tmp_path / "copy").mkdir()
    rows(0).to_parquet(tmp_path / "copy/train.parquet")
    load = datasets.load_dataset_builder

    def answer(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return load(str(tmp_path / "copy"))

    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda *_, **__: ["default"])
    monkeypatch.setattr(datasets, "load_dataset_builder", answer)
    monkeypatch.chdir(tmp_path)
    for root in ("hf://org/caps", Path("hf://org/caps@v1.0"), "hf://datasets/org/caps"):
        assert shape(index_dataset("auto", root)) == expected("train")
    assert asked == [(("org/caps", "default"), {"revision": r}) for r in (None, "v1.0", None)]
    for wrong in ("hf://", "hf://../caps", "hf://org/caps/more", "hf://org/caps@"):
        with pytest.raises(ValueError, match="is not a Hub data set; expected hf://org/name"):
            index_dataset("hf", wrong)
    (tmp_path / "org/caps").mkdir(parents=True)
    with pytest.raises(ValueError, match="org/caps is also a local folder"):
        index_dataset("hf", "hf://org/caps")


def test_without_the_hub_the_error_names_the_set() -> None:
    with pytest.raises(ValueError, match=r"cannot load Hugging Face data set hf://org/absent: .*"):
        index_dataset("auto", "hf://org/absent")


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"cannot load Hugging Face data set .*empty"):
        index_dataset("hf", tmp_path / "empty")
