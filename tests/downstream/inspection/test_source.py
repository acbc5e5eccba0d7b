"""Photographs from shards: the files, names and bytes of a run of the same photographs in a folder."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from adpretrain.data import Sample, shard_writer
from adpretrain.data.shard_writer import write_shards
from adpretrain.data.shards import Shards
from downstream.inspection import Options
from downstream.inspection.photos import Stored, find_images
from downstream.inspection.run import Inspection, score_folder
from downstream.inspection.source import InFolder, InShards, photographs_of

Write = Callable[..., Path]


@pytest.fixture
def line(write_tiles: Write) -> Path:
    """Nine photographs in three folders, two of them with names that give the same heatmap's name."""
    write_tiles("line/b", range(10, 13))
    write_tiles("line/b", range(30, 32), blob=True, prefix="disc")
    write_tiles("line/a", range(13, 16))
    images = write_tiles("line", range(16, 17), prefix="a_tile").parent / "line"
    (images / "a_tile_16.png").rename(images / "a_tile_13.png")
    return images


def shards_of(images: Path, folder: Path, count: int = 1) -> Path:
    samples = [Sample(path, None, "line", "good", None, "train", False) for path in find_images(images)]
    return write_shards(samples, folder, count, references=2)


def score(normal: Path, images: Path, out: Path, extractor: Path) -> Inspection:
    options = Options(false_alarm_rate=0.2, batch_size=4)
    return score_folder(extractor, normal, images, out, options=options, device="cpu")


def files(out: Path) -> dict[str, bytes]:
    """All but the report and the summary, which name the folder of the photographs and the time."""
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if name not in ("report.html", "summary.json")}


def test_shards_in_the_order_of_names_give_the_bytes_of_files(
    line: Path, write_tiles: Write, extractor_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    normal = write_tiles("shots", range(5))
    monkeypatch.setattr(shard_writer, "deal", lambda samples, count, seed: [samples])  # not shuffled
    monkeypatch.setattr(shard_writer, "ROW_GROUP_BYTES", 30_000)  # several row groups
    shards = shards_of(line, tmp_path / "shards")
    assert len(Shards(shards).keys("data/train-00000-of-00001.parquet")) > 2
    whole = score(normal, line, tmp_path / "files", extractor_dir)
    found = score(normal, shards, tmp_path / "sharded", extractor_dir)
    assert found.results == whole.results
    assert files(tmp_path / "sharded") == files(tmp_path / "files")
    assert "masks/b_disc_30.png" in files(tmp_path / "files")
    assert {"heatmaps/a_tile_13.png", "heatmaps/a_tile_13-2.png"} <= set(files(tmp_path / "files"))


def test_shuffled_shards_give_the_files_and_numbers_in_the_order_of_names(
    line: Path, write_tiles: Write, extractor_dir: Path, tmp_path: Path
) -> None:
    """In other batches, in which sums are rounded differently."""
    normal = write_tiles("shots", range(5))
    shards = shards_of(line, tmp_path / "shards", count=2)
    assert list(InShards(shards).order) != list(range(9))
    whole = score(normal, line, tmp_path / "files", extractor_dir)
    found = score(normal, shards, tmp_path / "sharded", extractor_dir)
    assert set(files(tmp_path / "sharded")) == set(files(tmp_path / "files"))
    for one, other in zip(found.results, whole.results, strict=True):
        for name in ("path", "verdict", "heatmap", "regions"):
            assert getattr(one, name) == getattr(other, name)
        assert (one.score, one.unlike) == pytest.approx((other.score, other.unlike), rel=1e-5)
    rows = list(csv.DictReader(io.StringIO(files(tmp_path / "sharded")["scores.csv"].decode())))
    assert [row["path"] for row in rows] == InFolder(line, find_images(line)).names


def test_every_file_is_the_one_of_its_name(line: Path, tmp_path: Path) -> None:
    """In any order of batches, as after a run that was interrupted."""
    source = photographs_of(shards_of(line, tmp_path / "shards", count=3))
    batches = [[8, 0], [3], [1, 2, 7]]
    for numbers, batch in zip(batches, source.files(batches), strict=True):
        for number, stored in zip(numbers, batch, strict=True):
            assert isinstance(stored, Stored)
            assert stored.getvalue() == (line / source.names[number]).read_bytes()
            assert str(stored) == source.names[number] == source.stamp(number)[0]
    assert sorted(source.names, key=Path) == [source.names[number] for number in source.order]


def test_a_key_that_occurs_twice_is_refused(line: Path, tmp_path: Path) -> None:
    """The writer refuses it too, but another program may have changed the shards."""
    shards = shards_of(line, tmp_path / "shards", count=2)
    one, two = (f"data/train-0000{number}-of-00002.parquet" for number in (0, 1))
    shutil.copy(shards / one, shards / two)
    index = json.loads((shards / "index.json").read_text())
    index["files"][two] = index["files"][one]
    (shards / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"tile_\d+\.png twice: write the shards again"):
        photographs_of(shards)


def test_a_file_that_is_no_picture_is_named(write_tiles: Write, extractor_dir: Path, tmp_path: Path) -> None:
    normal, images = write_tiles("shots", range(4)), write_tiles("line", range(10, 12))
    (images / "cut.png").write_bytes(b"no picture")
    Image.new("RGB", (96, 96)).save(images / "blank.png")
    found = score(normal, shards_of(images, tmp_path / "shards"), tmp_path / "out", extractor_dir)
    reasons = {result.path: result.reason for result in found.results if result.verdict == "unreadable"}
    assert reasons["cut.png"].startswith("cannot read image cut.png: its content is not a picture")
    assert reasons["blank.png"].startswith("blank.png is blank")
