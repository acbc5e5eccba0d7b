"""Shards in a data-set repository: the unmodified client reads them from the tests' Hub as from a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from hub_server import Hub, Repository
from huggingface_hub import constants
from pictures import mask, photograph

from adpretrain.config import DataConfig, PretrainConfig
from adpretrain.data import Sample, index_dataset
from adpretrain.data.shard_writer import write_shards
from adpretrain.data.shards import Photograph, Shards, pinned
from adpretrain.preprocess import Preprocess
from adpretrain.training.streamed import Draw, StreamedBatches, StreamedSet

NAME, ROOT = "factory/caps", "hf://factory/caps"


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    """The datasets library, too, talks to the tests' Hub, and not to the user's caches."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)


def shards_of(folder: Path, first: int) -> Path:
    """Nine normal photographs and three defects as four shards, and a category held out; other ones for each first."""
    samples = []
    for number in range(14):
        image = photograph(folder / "set" / f"{number}.png", first + number)
        truth = mask(folder / "set" / f"{number}_mask.png") if 8 < number < 12 else None
        category = "cap" if number < 12 else "nut"
        samples.append(Sample(image, truth, category, "dent" if truth else "good", None, "train"))
    return write_shards(samples[:12], folder / "shards", 4, samples[12:], references=4)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(shards: Shards) -> list[Photograph]:
    return list(shards.rows(sorted(shards.index.files)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shards_of(tmp_path / "first", 0)


@pytest.fixture
def repository(hub: Hub, folder: Path) -> Repository:
    """Private, as Real-IAD's must be; Ada is of the organisation."""
    repository = hub.add(NAME, kind="dataset", private=True)
    repository.write(contents(folder))
    return repository


def test_the_rows_are_those_of_the_folder(repository: Repository, folder: Path) -> None:
    ours, theirs = Shards(ROOT), Shards(folder)
    assert ours.index == theirs.index
    assert len(rows(ours)) == 12 + 4 + 2
    assert rows(ours) == rows(theirs)
    for part in ("references", "held_out"):
        pairs = zip(ours.samples(part), theirs.samples(part), strict=True)
        assert all(a.image.read_bytes() == b.image.read_bytes() and a.category == b.category for a, b in pairs)


def test_the_steps_are_those_of_the_folder(repository: Repository, folder: Path) -> None:
    """Images, order and references of two epochs on each of two processes."""

    def steps(root: str | Path, rank: int) -> list[list[Draw]]:
        data = StreamedSet(Shards(root), Preprocess(16), [1, 3], seed=3, reservoir=1 << 20)
        return list(StreamedBatches(data, 2, 0, 6, rank, 2))

    assert [steps(ROOT, rank) for rank in range(2)] == [steps(folder, rank) for rank in range(2)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_fetches_its_own_shards_only_and_each_byte_once(hub: Hub, repository: Repository, rank: int) -> None:
    shards = Shards(ROOT)
    names = shards.names("train")
    assert hub.count("parquet") == 0
    assert len(list(shards.rows(names, rank, 2))) == 6
    asked = [name for name in names for request in hub.requests if request.endswith(f"/{name}")]
    assert asked == names[rank::2]
    assert hub.count("^GET /lfs/") == 2
    assert not [request for request in hub.requests if "/resolve/main" in request]


def test_a_push_does_not_change_what_is_read(repository: Repository, folder: Path, tmp_path: Path) -> None:
    """Neither under a reader's feet, nor by a reader that names a tag or a commit."""
    first = repository.branches["main"]
    repository.tags["v1"] = first
    reading = Shards(ROOT)
    stream = reading.rows(reading.names("train"))
    begun = [next(stream)]
    other = shards_of(tmp_path / "second", 100)
    repository.write(contents(other))
    assert begun + list(stream) == list(Shards(folder).rows(reading.names("train")))
    for revision in ("v1", first, first[:9]):
        assert rows(Shards(f"{ROOT}@{revision}")) == rows(Shards(folder))
    assert rows(Shards(ROOT)) == rows(Shards(other)) != rows(Shards(folder))
    assert pinned(f"{ROOT}@v1") == f"{ROOT}@{first}"


def test_a_resumed_run_reads_what_it_began_with(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "recipes"))
    from adpretrain.training.sources import root_of_run

    first = repository.branches["main"]
    config = PretrainConfig(run=str(tmp_path / "run"), data=DataConfig("shards", ROOT))
    assert root_of_run(config, main=True) == f"{ROOT}@{first}"
    second = repository.write({"index.json": b"{}"})
    assert root_of_run(config, main=True) == f"{ROOT}@{second}"  # nothing was trained yet
    (tmp_path / "run" / "config.yaml").touch()
    third = repository.write({"index.json": b"[]"})
    assert root_of_run(config, main=True) == f"{ROOT}@{second}"
    for changed in (
        dataclasses.replace(config, run=str(tmp_path / "another")),
        dataclasses.replace(config, data=DataConfig("shards", f"{ROOT}@main")),
    ):
        assert root_of_run(changed, main=True) == f"{ROOT}@{third}"
    local = dataclasses.replace(config, data=DataConfig("shards", "data/shards"))
    assert root_of_run(local, main=True) == "data/shards"


@pytest.mark.parametrize("kind", ["truncate", "drop", "status"])
def test_a_moment_of_trouble_is_waited_out(hub: Hub, repository: Repository, folder: Path, kind: str) -> None:
    hub.break_next("^GET /api/datasets", "status" if kind == "status" else "drop", times=2)
    shards = Shards(ROOT)
    before = len(hub.sleeps)
    hub.break_next("^GET /lfs/", kind, times=2)  # type: ignore[arg-type]
    assert rows(shards) == rows(Shards(folder))
    assert before == 2
    assert len(hub.sleeps) == 4


def without(repository: Repository, name: str) -> None:
    repository.apply("main", "less", [{"key": "deletedFile", "value": {"path": name}}])


def read(root: str) -> list[Photograph]:
    shards = Shards(root)
    return list(shards.rows(shards.names("train")))


SHARD = "data/train-00002-of-00004.parquet"
Break = Callable[[Hub, Repository, pytest.MonkeyPatch], object]
TROUBLES: dict[str, tuple[Break, str]] = {
    "missing": (lambda hub, it, patch: hub.repositories.clear(), r"cannot stream datasets/factory/caps: it is neither"),
    "model": (
        lambda hub, it, patch: setattr(it, "kind", "model"),
        r"cannot stream datasets/factory/caps: it is neither",
    ),
    "private": (
        lambda hub, it, patch: patch.setenv("HF_TOKEN", "token-of-bob"),
        r"cannot stream datasets/factory/caps: it is neither .*; if it is private, log in",
    ),
    "gated": (
        lambda hub, it, patch: (patch.setenv("HF_TOKEN", "token-of-bob"), vars(it).update(private=False, gated=True)),
        r"cannot read index.json .* it is gated\. Ask for access at http://127\.0\.0\.1:\d+/datasets/factory/caps,",
    ),
    "token": (
        lambda hub, it, patch: patch.setenv("HF_TOKEN", "token-of-nobody"),
        r"cannot stream datasets/factory/caps: the token is wrong",
    ),
    "offline": (
        lambda hub, it, patch: patch.setattr(constants, "HF_HUB_OFFLINE", True),
        r"hf://factory/caps is streamed, which HF_HUB_OFFLINE forbids: unset it, or .*-type dataset factory/caps`",
    ),
    "no connection": (lambda hub, it, patch: hub.stop(), r"cannot stream datasets/factory/caps: no connection to http"),
    "busy": (
        lambda hub, it, patch: hub.break_next("index.json", "status", times=99),
        r"cannot read index.json and data/ of datasets/factory/caps: the Hub is in trouble \(status 503, tried 6",
    ),
    "no index": (
        lambda hub, it, patch: without(it, "index.json"),
        r"hf://factory/caps holds no shards: .*FileNotFoundError: .*index\.json\); recipes/write_shards\.py",
    ),
    "no data": (
        lambda hub, it, patch: [without(it, name) for name in list(it.contents()) if name != "index.json"],
        r"hf://factory/caps holds no shards: .*FileNotFoundError: .*data\); recipes/write_shards\.py",
    ),
    "truncated": (
        lambda hub, it, patch: it.write({SHARD: it.contents()[SHARD][:-100]}),
        rf"hf://factory/caps/{SHARD} has \d+ bytes, \d+ were written: copy it again",
    ),
    "a file missing": (
        lambda hub, it, patch: without(it, SHARD),
        rf"hf://factory/caps/{SHARD} is missing",
    ),
    "cut off": (
        lambda hub, it, patch: hub.break_next("^GET /lfs/", "truncate", times=99),
        r"cannot read data/train-00000-of-00004\.parquet of datasets/factory/caps: no connection to .*Check the",
    ),
    "flipped": (
        lambda hub, it, patch: it.write({SHARD: it.contents()[SHARD].replace(b"IDAT", b"IDAU")}),
        rf"hf://datasets/factory/caps@[0-9a-f]{{40}}/{SHARD} cannot be read \(OSError: .*CRC.*\): copy it again",
    ),
}


@pytest.mark.parametrize("kind", TROUBLES)
def test_what_cannot_be_streamed_is_named_in_one_line(
    hub: Hub, repository: Repository, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    spoil, words = TROUBLES[kind]
    spoil(hub, repository, monkeypatch)
    with pytest.raises(ValueError, match=words) as caught:
        read(ROOT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("root", "words"),
    [
        (f"{ROOT}@v7", "cannot stream 'v7' of datasets/factory/caps: it has no such revision"),
        ("hf://caps", "cannot stream datasets/caps: "),
        ("hf://factory/caps/data", "'hf://factory/caps/data' is not a Hub data set; expected hf://org/name"),
    ],
)
def test_a_name_that_is_none_is_named(repository: Repository, root: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        Shards(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["auto", "hf"])
def test_shards_are_not_taken_for_a_labelled_set(hub: Hub, repository: Repository, folder: Path, layout: str) -> None:
    """Nothing is downloaded to find that out."""
    for root in (ROOT, str(folder)):
        with pytest.raises(ValueError, match=rf"{root}: .*shards for pretraining, which data\.name shards streams"):
            index_dataset(layout, root)
    assert hub.count("parquet") == 0
