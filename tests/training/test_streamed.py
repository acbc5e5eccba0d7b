"""Pretraining steps from shards: who sees which image when, with which references, in how much memory."""

from __future__ import annotations

import tracemalloc
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import mask
from PIL import Image

from adpretrain.data import Sample
from adpretrain.data import shard_writer as writer
from adpretrain.data.shard_writer import write_shards
from adpretrain.data.shards import Photograph, Shards
from adpretrain.preprocess import Preprocess
from adpretrain.training.dataset import PretrainingSet
from adpretrain.training.loader import Request, load_ahead
from adpretrain.training.streamed import Draw, Reservoir, StreamedBatches, StreamedSet, mix

PREPROCESS = Preprocess(16)
SHOTS = [1, 3]
ENOUGH = 1 << 20


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Two categories, two views, thirteen normal images and five defects of each: 72."""
    folder = tmp_path_factory.mktemp("set")
    found = []
    for category in ("cap", "nut"):
        for view in ("C1", "C2"):
            for number in range(18):
                image = folder / f"{category}-{view}-{number}.png"
                pixels = np.random.default_rng(len(found)).integers(0, 256, (8, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(image)
                truth = mask(image.with_name(f"{image.stem}_mask.png")) if number >= 13 else None
                found.append(Sample(image, truth, category, "dent" if truth else "good", view, "train"))
    return found


@pytest.fixture(scope="module")
def shards(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return Shards(write_shards(samples, tmp_path_factory.mktemp("shards") / "six", 6, references=6))


@pytest.fixture(scope="module")
def data(shards: Shards) -> StreamedSet:
    return StreamedSet(shards, PREPROCESS, SHOTS, seed=3, reservoir=ENOUGH)


def epochs(data: StreamedSet, batch: int, count: int, rank: int = 0, processes: int = 1) -> list[list[Draw]]:
    per_epoch = StreamedBatches(data, batch, 0, 0, rank, processes).per_epoch
    return list(StreamedBatches(data, batch, 0, count * per_epoch, rank, processes))


def keys(batches: list[list[Draw]]) -> list[str]:
    return [draw.row.key for batch in batches for draw in batch]


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_every_image_is_met_once_per_epoch_by_one_process(data: StreamedSet, processes: int) -> None:
    ranks = [epochs(data, 4, 2, rank, processes) for rank in range(processes)]
    assert {len(batches) for batches in ranks} == {2 * 72 // (4 * processes)}
    assert {len(batch) for batches in ranks for batch in batches} == {4}
    shares = []
    for epoch in range(2):
        parts = [keys([batch for batch in batches if batch[0].epoch == epoch]) for batches in ranks]
        met = Counter(key for part in parts for key in part)
        assert len(met) == 72
        assert set(met.values()) == {1}
        shares.append(list(map(set, parts)))
    assert keys(ranks[0])[: len(keys(ranks[0])) // 2] != keys(ranks[0])[len(keys(ranks[0])) // 2 :]
    if processes > 1:
        assert shares[0] != shares[1]  # dealt anew


def test_unequal_shares_make_equal_steps_and_lose_less_than_a_batch_and_a_row_a_shard(
    samples: list[Sample], tmp_path: Path
) -> None:
    """70 images in 6 shards of 11 or 12, three to each of two processes."""
    data = StreamedSet(Shards(write_shards(samples[:70], tmp_path / "s", 6, references=6)), PREPROCESS, SHOTS, seed=0)
    ranks = [epochs(data, 4, 5, rank, 2) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    for epoch in range(5):
        met = Counter(key for batches in ranks for key in keys([b for b in batches if b[0].epoch == epoch]))
        assert set(met.values()) == {1}
        assert 70 - len(met) <= 2 * (3 + 3)


@pytest.mark.parametrize("processes", [1, 3])
def test_references_are_those_of_a_naive_reservoir(data: StreamedSet, shards: Shards, processes: int) -> None:
    """Normal, of the same category and view, distinct, never the image itself; set aside or met before."""
    aside = {row.key: row for row in shards.rows(shards.names("references"))}
    first = []
    for rank in range(processes):
        sizes, drawn = set(), defaultdict(set)
        pools: dict[str, list[str]] = {}
        epoch = -1
        for batch in epochs(data, 4, 3, rank, processes):
            if batch[0].epoch != epoch:
                epoch, pools = batch[0].epoch, defaultdict(list)
            for draw in batch:
                chosen = [other.key for other in draw.references]
                sizes.add(len(chosen))
                assert len(set(chosen)) == len(chosen)
                assert draw.row.key not in chosen
                assert all(other.normal and other.group == draw.row.group for other in draw.references)
                assert all(key in pools[draw.row.group] or key in aside for key in chosen)
                drawn[draw.row.group] |= set(chosen) - set(pools[draw.row.group])
                if draw.row.normal:
                    pools[draw.row.group].append(draw.row.key)
        assert sizes == set(SHOTS)
        assert all(len(keys) <= max(SHOTS) + 1 for keys in drawn.values())  # of the six set aside, four serve
        first.append(drawn)
    assert processes == 1 or first[0] != first[1]  # others on every process


def test_all_draws_derive_from_seed_epoch_rank_and_image(data: StreamedSet, shards: Shards) -> None:
    torch.manual_seed(0)
    whole = epochs(data, 4, 2, 1, 2)
    torch.manual_seed(1)
    assert epochs(StreamedSet(shards, PREPROCESS, SHOTS, seed=3, reservoir=ENOUGH), 4, 2, 1, 2) == whole
    assert keys(epochs(StreamedSet(shards, PREPROCESS, SHOTS, seed=4, reservoir=ENOUGH), 4, 2, 1, 2)) != keys(whole)


@pytest.mark.parametrize("start", [1, 8, 9, 10, 17])
def test_a_resumed_run_is_the_tail_of_an_uninterrupted_one(data: StreamedSet, start: int) -> None:
    whole = list(StreamedBatches(data, 4, 0, 20, 1, 2))  # nine steps an epoch
    tail = StreamedBatches(data, 4, start, 20, 1, 2)
    assert list(tail) == whole[start:]
    assert len(tail) == 20 - start


def test_workers_and_resuming_leave_the_pixels_bit_equal(data: StreamedSet) -> None:
    def loaded(start: int, workers: int) -> list[torch.Tensor]:
        steps = map(Request, StreamedBatches(data, 4, start, 11, 0, 2))
        batches = list(load_ahead(data.load, steps, workers, torch.device("cpu")))[-2:]
        return [part for batch in batches for part in (batch.views, batch.masks, *(unit for _, unit in batch.units))]

    expected = loaded(0, 0)
    for start, workers in ((0, 2), (9, 1)):
        assert all(map(torch.equal, loaded(start, workers), expected))


def test_a_step_is_loaded_as_from_files(shards: Shards, samples: list[Sample]) -> None:
    """The same photographs through `PretrainingSet`: pixels, masks and references are equal to the last bit."""
    streamed = StreamedSet(shards, PREPROCESS, SHOTS, seed=3, augment="none", reservoir=ENOUGH)
    files = PretrainingSet(samples, PREPROCESS, SHOTS, seed=3, augment="none")
    places = {sample.image.name: place for place, sample in enumerate(samples)}
    for step in StreamedBatches(streamed, 12, 0, 6):
        batch = streamed.load(Request(step))
        of = {draw.row.index: places[draw.row.key] for draw in step}
        for row, (_, index) in enumerate(batch.keys):
            assert batch.views[row].equal(files.views(of[index], 0))
            assert batch.masks[row].equal(files.mask(of[index]))
        assert batch.masks.any()
        ((names, pixels),) = batch.units
        assert all(pixels[i].equal(files.pixels(places[str(name)])) for i, name in enumerate(names))
        assert {name for _, chosen in batch.sets for name in chosen} == set(names)


def row(key: str, normal: bool = True, group: str = "cap", size: int = 3) -> Photograph:
    return Photograph(b"x" * size, None, group, "good" if normal else "dent", None, "train", False, key)


def test_no_process_is_given_an_unmarked_view_of_a_defective_part(samples: list[Sample], tmp_path: Path) -> None:
    """Neither as an image nor as a reference, though two of the thirteen normal images of a group are such views."""
    marked = [replace(s, of_defective_part=s.image.stem.endswith(("-0", "-1"))) for s in samples]
    data = StreamedSet(Shards(write_shards(marked, tmp_path / "two", 2, references=6)), PREPROCESS, SHOTS, seed=3)
    draws = [draw for batch in epochs(data, 4, 2) for draw in batch]
    images = {draw.row.key for draw in draws}
    references = {row.key for draw in draws for row in draw.references}
    assert len(images) > 50
    assert len(references) > 20
    assert not any(key.removesuffix(".png").endswith(("-0", "-1")) for key in images | references)


def test_a_reservoir_keeps_the_last_normal_photographs_of_each_group() -> None:
    reservoir = Reservoir([row("a"), row("b")], capacity=3)
    for added in (row("c"), row("bad", normal=False), row("b"), row("d"), row("n", group="nut")):
        reservoir.add(added)
    assert [other.key for other in reservoir.pools["cap"]] == ["b", "c", "d"]
    assert [other.key for other in reservoir.pools["nut"]] == ["n"]
    rng = np.random.default_rng(0)
    met = Counter(other.key for _ in range(600) for other in reservoir.draw(row("c"), [1], rng))
    assert set(met) == {"b", "d"}
    assert abs(met["b"] - 300) < 4 * 600**0.5 / 2  # even odds, within four deviations


@pytest.mark.parametrize("size", [1, 5, 50])
def test_mixing_loses_nothing_and_holds_no_more_than_it_may(size: int) -> None:
    taken = 0

    def rows() -> object:
        nonlocal taken
        for number in range(30):
            taken += 1
            yield number

    mixed, ahead = [], []
    for item in mix(rows(), size, np.random.default_rng(0)):
        mixed.append(item)
        ahead.append(taken - len(mixed))
    assert sorted(mixed) == list(range(30))
    assert max(ahead) <= size
    assert (mixed == list(range(30))) == (size == 1)


def test_what_a_process_holds_stays_below_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 MB of photographs, 8 MB of reservoir: Python's memory over three epochs, which does not grow either."""
    monkeypatch.setattr(writer, "ROW_GROUP_BYTES", 1 << 20)
    rng = np.random.default_rng(0)
    samples = []
    for number in range(300):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(rng.bytes(int(rng.integers(50_000, 150_000))))
        samples.append(Sample(path, None, "cap" if number % 2 else "nut", "good", None, "train"))
    shards = Shards(write_shards(samples, tmp_path / "shards", 4, references=8))
    data = StreamedSet(shards, PREPROCESS, [4], seed=0, reservoir=8 << 20)
    steps = iter(StreamedBatches(data, 5, 0, 180))
    next(steps)
    tracemalloc.start()
    peaks, reservoirs = [], []
    for _ in range(3):
        tracemalloc.reset_peak()
        for _ in range(59):
            drawn = next(steps)
            reservoirs.append(sum(len(other.image) for draw in drawn for other in draw.references))
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    # Beside the reservoir: a row group as Arrow's and as Python's, and the step read ahead, which holds references that
    # the reservoir has dropped.
    assert max(peaks) < (8 << 20) + (1 << 20) + 3 * max(reservoirs)
    assert peaks[2] < 1.1 * peaks[1]


def test_mistakes_are_named_with_the_numbers_that_would_do(shards: Shards, data: StreamedSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"K = 13 references need 14 normal images .*cap/C1, .*lower shots \[13\]"):
        StreamedSet(shards, PREPROCESS, [13], seed=0)
    with pytest.raises(ValueError, match=r"has 6: write the shards with --references 8 or lower shots"):
        StreamedSet(shards, PREPROCESS, [7], seed=0)
    with pytest.raises(ValueError, match=r"6 shards cannot be dealt to 4 processes: start one of \[1, 2, 3, 6\]"):
        StreamedBatches(data, 4, 0, 1, 0, 4)
    with pytest.raises(ValueError, match=r"a batch of 40 images exceeds a process's share of 72 images on 2"):
        StreamedBatches(data, 40, 0, 1, 0, 2)
    with pytest.raises(ValueError, match=r"data\.reservoir_mb 0 cannot hold 8 photographs of each of 4 .* at least 1"):
        StreamedSet(shards, PREPROCESS, SHOTS, seed=0, reservoir=1000)
    assert StreamedSet(shards, PREPROCESS, SHOTS, seed=0, reservoir=1 << 20).capacity >= 4


def test_a_row_that_the_index_does_not_know_is_refused(data: StreamedSet) -> None:
    batches = StreamedBatches(data, 4, 0, 1)
    largest = data.shards.index.largest["cap/C1"]
    fine = Photograph(b"x" * largest, None, "cap", "good", "C1", "train", False, "a")
    assert batches._checked(fine) is fine
    for wrong in (row("b", group="screw"), Photograph(b"x" * (largest + 1), *list(vars(fine).values())[1:])):
        with pytest.raises(ValueError, match=r"is not in its index\.json: write the shards again"):
            batches._checked(wrong)


def test_a_file_that_is_no_image_is_named(data: StreamedSet) -> None:
    with pytest.raises(ValueError, match=r"'broken\.png' in .* is no image: cannot identify image file"):
        data.load(Request([Draw(0, row("broken.png"), [])]))
