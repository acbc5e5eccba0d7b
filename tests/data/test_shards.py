"""Shards: what is written, how it is dealt, read back by the datasets library, and what is refused."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import mask, photograph
from PIL import Image

from adpretrain.data import Sample
from adpretrain.data import shard_writer as writer
from adpretrain.data.samples import load_mask
from adpretrain.data.shard_writer import deal, write_shards
from adpretrain.data.shards import Shards
from adpretrain.preprocess import Preprocess


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Two categories, two views; five normal images (one an unmarked view of a defective part), two defects of each."""
    found = []
    for category in ("cap", "nut"):
        for view in ("C1", "C2"):
            for number in range(7):
                seed = len(found)
                image = photograph(
                    tmp_path / "set" / category / f"{view}-{number}.{'jpg' if seed % 2 else 'png'}", seed
                )
                truth = mask(image.with_name(f"{image.stem}_mask.png")) if number > 4 else None
                defect = "dent" if truth else "good"
                found.append(Sample(image, truth, category, defect, view, "train", number == 4))
    return found


@pytest.fixture
def folder(samples: list[Sample], tmp_path: Path) -> Path:
    return write_shards(samples, tmp_path / "shards", 4, references=3)


def labels(row: dict[str, object]) -> tuple[object, ...]:
    return tuple(row[name] for name in ("category", "defect", "view", "split", "of_defective_part"))


def test_the_datasets_library_reads_every_file_as_it_was(folder: Path, samples: list[Sample], tmp_path: Path) -> None:
    """`load_dataset` of the folder, streamed and not, knowing nothing of us."""
    stream = datasets.load_dataset(str(folder), streaming=True)
    assert list(stream) == ["train", "references"]
    rows = {row["key"]: row for row in stream["train"]}
    trained_on = [sample for sample in samples if not sample.of_defective_part]
    assert len(rows) == len(trained_on) == len(samples) - 4
    for sample in trained_on:
        row = rows[sample.image.relative_to(tmp_path / "set").as_posix()]
        assert row["image"] == sample.image.read_bytes()
        assert row["mask"] == (sample.mask.read_bytes() if isinstance(sample.mask, Path) else None)
        assert labels(row) == (sample.category, sample.defect, sample.view, sample.split, sample.of_defective_part)
    assert datasets.load_dataset(str(folder), split="train").num_rows == len(trained_on)
    references = list(stream["references"])
    assert Counter((row["category"], row["view"]) for row in references) == {
        (category, view): 3 for category in ("cap", "nut") for view in ("C1", "C2")
    }
    assert all(row["defect"] == "good" and rows[row["key"]] == row for row in references)


def test_the_index_counts_what_is_there(folder: Path, samples: list[Sample]) -> None:
    index = Shards(folder).index
    assert index.normals == {f"{category}/{view}": 4 for category in ("cap", "nut") for view in ("C1", "C2")}
    for category, view in (name.split("/") for name in index.normals):
        good = [s for s in samples if s.defect == "good" and not s.of_defective_part]
        group = [s.image.stat().st_size for s in good if (s.category, s.view) == (category, view)]
        assert index.largest[f"{category}/{view}"] == max(group)
    assert index.longest == max(s.image.stat().st_size + sum(f.stat().st_size for f in s.mask_files) for s in samples)
    for name, counts in index.files.items():
        assert counts == {"rows": pq.read_metadata(folder / name).num_rows, "bytes": (folder / name).stat().st_size}


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_every_shard_has_its_share_of_every_kind(shards: int) -> None:
    rng = np.random.default_rng(shards)
    kinds = [("cap", None, "good"), ("cap", None, "dent"), ("nut", "C1", "good"), ("nut", "C2", "good")]
    samples = [
        Sample(Path(f"{number}-{i}.png"), None, category, defect, view, "train")
        for number, (category, view, defect) in enumerate(kinds)
        for i in range(int(rng.integers(1, 40)))
    ]
    parts = deal(samples, shards, seed=1)
    assert Counter(sample.image for part in parts for sample in part) == Counter(sample.image for sample in samples)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for category, view, defect in kinds:
        counts = [sum((s.category, s.view, s.defect) == (category, view, defect) for s in part) for part in parts]
        assert max(counts) - min(counts) <= 1
    assert deal(samples, shards, seed=1) == parts
    assert deal(samples, shards, seed=2) != parts


def test_the_same_set_gives_the_same_bytes(folder: Path, samples: list[Sample], tmp_path: Path) -> None:
    again = write_shards(samples, tmp_path / "again", 4, references=3)
    for name in Shards(folder).index.files:
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_several_masks_of_one_image_become_their_union(tmp_path: Path) -> None:
    image = photograph(tmp_path / "a.png")
    both = (mask(tmp_path / "m0.png", (0, 0, 4, 4), value=1), mask(tmp_path / "m1.png", (8, 4, 12, 8)))
    sample = Sample(image, both, "box", "missing", None, "train")
    (row,) = Shards(write_shards([sample], tmp_path / "shards", 1)).rows(["data/train-00000-of-00001.parquet"])
    assert row.mask is not None
    with Image.open(io.BytesIO(row.mask)) as merged:
        found = Preprocess(16).mask(merged)
    assert found.equal(load_mask(sample, (12, 8), Preprocess(16)))
    assert 0 < found.sum() < 16 * 16


def test_held_out_categories_lie_apart_and_come_back_as_files(
    samples: list[Sample], tmp_path: Path, caches: Path
) -> None:
    training, held_out = samples[:14], samples[14:]
    shards = Shards(write_shards(training, tmp_path / "shards", 2, held_out, references=2))
    assert (shards.index.categories, shards.index.held_out) == (["cap"], ["nut"])
    assert {row.category for row in shards.rows(shards.names("train"))} == {"cap"}
    found = shards.samples("held_out")
    assert [s.image.read_bytes() for s in found] == [s.image.read_bytes() for s in held_out]
    same = [[(s.category, s.defect, s.view, s.split, s.of_defective_part) for s in part] for part in (found, held_out)]
    assert same[0] == same[1]
    assert all(file.is_relative_to(caches / "adpretrain") for s in found for file in (s.image, *s.mask_files))
    assert [(s.category, s.view) for s in shards.samples("references", 1)] == [("cap", "C1"), ("cap", "C2")]


def test_a_failed_writing_leaves_what_was_there(folder: Path, samples: list[Sample]) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    samples[-1].image.unlink()
    with pytest.raises(FileNotFoundError):
        write_shards(samples, folder, 2)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_mistakes_are_named(folder: Path, samples: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"25 shards for 24 images: choose a number in 1\.\.24"):
        write_shards(samples, tmp_path / "other", 25)
    with pytest.raises(ValueError, match="holds other files than shards"):
        write_shards(samples, tmp_path / "set", 4)
    with pytest.raises(ValueError, match=r"C1-0\.png is in the set twice"):
        write_shards([*samples, samples[0]], tmp_path / "other", 4)
    bare = Sample(samples[0].image, None, "cap", "dent", "C1", "train")
    with pytest.raises(ValueError, match=r"C1-0\.png is a defect without a mask"):
        write_shards([bare], tmp_path / "other", 1)
    with pytest.raises(ValueError, match=r"holds no shards: .*FileNotFoundError.*write_shards\.py"):
        Shards(tmp_path / "nowhere")
    assert not (tmp_path / "other").exists()


def test_a_truncated_or_missing_shard_is_named(folder: Path) -> None:
    path = folder / "data/train-00002-of-00004.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(
        ValueError,
        match=rf"train-00002-of-00004\.parquet has {len(content) - 100} bytes, {len(content)} were written: copy it ag",
    ):
        Shards(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"train-00002-of-00004\.parquet is missing"):
        Shards(folder)


def test_a_flipped_bit_does_not_reach_the_training(folder: Path) -> None:
    shards = Shards(folder)
    name = shards.names("train")[1]
    picture = next(shards.rows([name])).image
    content = bytearray((folder / name).read_bytes())
    content[content.index(picture) + len(picture) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read \(.*CRC checksum.*\): copy it again"):
        list(Shards(folder).rows([name]))


def replace(folder: Path, name: str, table: pa.Table) -> None:
    """Another file in a shard's place, as a stranger would make one: the index fits."""
    pq.write_table(table, folder / name)
    index = json.loads((folder / "index.json").read_text())
    index["files"][name]["bytes"] = (folder / name).stat().st_size
    (folder / "index.json").write_text(json.dumps(index))


def test_names_in_a_hostile_shard_are_never_paths(folder: Path, tmp_path: Path, caches: Path) -> None:
    name = "data/references-00000-of-00001.parquet"
    table = pq.read_table(folder / name)
    rows, last = table.num_rows, table.schema.get_field_index("key")
    names = ["../../escaped.png", str(tmp_path / "escaped.png"), "a\0b", "~/escaped"]
    keys = pa.array([names[i % 4] + (str(i) if i > 3 else "") for i in range(rows)])
    replace(folder, name, table.set_column(last, table.schema.field("key"), keys))
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(caches)}
    samples = Shards(folder).samples("references")
    assert len(samples) == rows
    assert all(s.image.is_relative_to(caches / "adpretrain") for s in samples)
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(caches)} == before


def test_other_columns_are_named(folder: Path) -> None:
    name = "data/train-00001-of-00004.parquet"
    table = pq.read_table(folder / name)
    for other in (table.drop_columns("key"), table.set_column(0, "image", pa.array(["x"] * len(table)))):
        replace(folder, name, other)
        with pytest.raises(ValueError, match=rf"{name} cannot be read \(ValueError: columns \[.*or of other types"):
            list(Shards(folder).rows([name]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"files": {"../../etc/passwd": {"rows": 1, "bytes": 1}}}, "names '../../etc/passwd', which is not a shard"),
        ({"files": {"data/train-00000-of-00001.parquet": {"rows": 1}}}, "has no rows or bytes of data/train-00000"),
        ({"format": 7}, "is of format 7, not 2"),
        ({"longest": "much"}, "longest"),
        ({"extra": 1}, "unknown key extra"),
    ],
)
def test_a_foreign_index_is_refused(folder: Path, change: dict[str, object], words: str) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(ValueError, match=words):
        Shards(folder)


def test_an_index_of_absurd_size_is_not_read(folder: Path) -> None:
    with (folder / "index.json").open("ab") as file:
        file.truncate(65 << 20)  # a hole: no disk is needed
    with pytest.raises(ValueError, match=f"index.json has {65 << 20} bytes, more than {64 << 20}"):
        Shards(folder)


def test_writing_and_reading_hold_row_groups_not_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 files of 200 kB in one shard of 12 MB, in row groups of 1 MB."""
    monkeypatch.setattr(writer, "ROW_GROUP_BYTES", 1 << 20)
    samples = []
    for number in range(60):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(np.random.default_rng(number).bytes(200_000))
        samples.append(Sample(path, None, "cap", "good", None, "train"))

    def peak_MB(work: Iterator[object]) -> float:
        """Of Python's and of Arrow's memory."""
        held = pa.total_allocated_bytes()
        arrow = 0
        tracemalloc.start()
        for _ in work:
            arrow = max(arrow, pa.total_allocated_bytes() - held)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return (peak + arrow) / 1e6

    def tracked() -> Iterator[object]:
        seen: list[object] = []
        write_shards(samples, tmp_path / "shards", 1, track=lambda items, total: map(seen.append, items))
        yield seen

    assert peak_MB(tracked()) < 5
    shards = Shards(tmp_path / "shards")
    assert peak_MB(shards.rows(shards.names("train"))) < 6
