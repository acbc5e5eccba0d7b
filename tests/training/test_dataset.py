"""Reference draws, resumable batches and token labels of pretraining."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from adpretrain.data import Sample
from adpretrain.preprocess import Preprocess
from adpretrain.training.batches import token_labels
from adpretrain.training.dataset import PretrainingSet, StepBatches
from adpretrain.training.loader import Request

PREPROCESS = Preprocess(image_size=32)
SHOTS = [1, 2, 4]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Two categories, two views, six normal images and one defect of each; every picture has its own colour."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    found = []
    for category in ("cap", "nut"):
        for view in ("C1", "C2"):
            for index in range(7):
                image = folder / f"{category}_{view}_{index}.png"
                Image.fromarray(rng.integers(50, 200, (32, 32, 3), dtype=np.uint8)).save(image)
                mask = None
                if index == 6:
                    mask = folder / f"{category}_{view}_mask.png"
                    Image.fromarray(np.eye(32, dtype=np.uint8) * 255).save(mask)
                found.append(Sample(image, mask, category, "dent" if mask else "good", view, "train"))
    return found


def test_references_are_distinct_normals_of_the_same_category_and_view_never_the_query(samples: list[Sample]) -> None:
    data = PretrainingSet(samples, PREPROCESS, SHOTS, seed=3)
    sizes, met = set(), {index: set() for index in range(len(samples))}
    for epoch in range(60):
        for index, sample in enumerate(samples):
            chosen = data.draw_references(index, epoch)
            sizes.add(len(chosen))
            met[index] |= set(chosen)
            assert len(set(chosen)) == len(chosen)
            assert index not in chosen
            for other in chosen:
                assert not samples[other].anomalous
                assert (samples[other].category, samples[other].view) == (sample.category, sample.view)
    assert sizes == set(SHOTS)
    assert all(len(seen) == (6 if samples[index].anomalous else 5) for index, seen in met.items())  # the whole pool


def test_draws_derive_from_seed_epoch_and_index_alone(samples: list[Sample]) -> None:
    def draws(seed: int, epoch: int) -> list[list[int]]:
        data = PretrainingSet(samples, PREPROCESS, SHOTS, seed)
        return [data.draw_references(index, epoch) for index in range(len(samples))]

    torch.manual_seed(0)
    expected = draws(3, 2)
    torch.manual_seed(1)
    assert draws(3, 2) == expected
    assert draws(3, 1) != expected
    assert draws(4, 2) != expected
    data = PretrainingSet(samples, PREPROCESS, SHOTS, seed=3)
    assert [data.draw_references(index, 2) for index in reversed(range(len(samples)))] == expected[::-1]


def test_a_step_is_what_its_parts_are(samples: list[Sample]) -> None:
    data = PretrainingSet(samples, PREPROCESS, SHOTS, seed=3)
    keys = [(5, index) for index in (6, 0, 9, 13, 3, 1)]
    batch = data.load(Request(keys))
    assert sorted(batch.keys) == sorted(keys)
    for row, (epoch, index) in enumerate(batch.keys):
        assert torch.equal(batch.views[row], data.views(index, epoch))
        assert torch.equal(batch.masks[row], torch.eye(32, dtype=torch.bool) if index in (6, 13) else data.mask(0))
    drawn = [tuple(data.draw_references(index, epoch)) for epoch, index in batch.keys]
    assert [chosen for count, chosen in batch.sets for _ in range(count)] == drawn
    assert [len(chosen) for chosen in drawn] == sorted(len(chosen) for chosen in drawn)
    ((names, pixels),) = batch.units
    assert sorted(names) == sorted({other for chosen in drawn for other in chosen})  # each is read once
    for name, photograph in zip(names, pixels, strict=True):
        assert torch.equal(photograph, data.pixels(name))
    again = PretrainingSet(samples, PREPROCESS, SHOTS, seed=3).load(Request(keys))
    assert torch.equal(again.views, batch.views)


def test_augmentation_once_keeps_views_over_epochs_and_none_is_plain(samples: list[Sample]) -> None:
    epoch, once, none = (
        PretrainingSet(samples, PREPROCESS, SHOTS, seed=3, augment=mode) for mode in ("epoch", "once", "none")
    )
    assert epoch.views(0, 0).shape == (2, 3, 32, 32)
    assert not torch.equal(epoch.views(0, 0), epoch.views(0, 1))
    assert torch.equal(once.views(0, 0), once.views(0, 1))
    assert torch.equal(none.views(0, 1), none.pixels(0)[None])
    with pytest.raises(ValueError, match=r"'always' is unknown.*'epoch', 'once', 'none'"):
        PretrainingSet(samples, PREPROCESS, SHOTS, seed=3, augment="always")


def test_a_pool_that_is_too_small_is_named(samples: list[Sample]) -> None:
    with pytest.raises(ValueError, match=r"K = 6 references need 7 normal images .*cap C1, .*lower shots \[1, 6\]"):
        PretrainingSet(samples, PREPROCESS, [1, 6], seed=0)
    only_defects = [s for s in samples if s.anomalous or s.view == "C1"]
    with pytest.raises(ValueError, match="too few in cap C2, nut C2:"):
        PretrainingSet(only_defects, PREPROCESS, [1], seed=0)


@pytest.mark.parametrize("start", [0, 1, 4, 5, 9])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_run_is_the_tail_of_an_uninterrupted_one(start: int, processes: int) -> None:
    for rank in range(processes):
        whole = list(StepBatches(23, 4 // processes, 0, 17, seed=1, rank=rank, processes=processes))
        tail = StepBatches(23, 4 // processes, start, 17, seed=1, rank=rank, processes=processes)
        assert list(tail) == whole[start:]
        assert len(tail) == 17 - start


@pytest.mark.parametrize("processes", [2, 3])
def test_ranks_partition_the_global_batch(processes: int) -> None:
    one = list(StepBatches(40, 12, 0, 10, seed=1))
    ranks = [list(StepBatches(40, 12 // processes, 0, 10, 1, rank, processes)) for rank in range(processes)]
    for step, batch in enumerate(one):
        parts = [rank[step] for rank in ranks]
        assert {len(part) for part in parts} == {12 // processes}
        assert sorted(key for part in parts for key in part) == sorted(batch)


def test_every_epoch_is_another_permutation() -> None:
    batches = StepBatches(24, 4, 0, 18, seed=1)
    assert batches.per_epoch == 6
    keys = [key for batch in batches for key in batch]
    orders = [[index for epoch, index in keys if epoch == number] for number in range(3)]
    assert [sorted(order) for order in orders] == [list(range(24))] * 3
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert [key for batch in StepBatches(24, 4, 0, 18, seed=2) for key in batch] != keys
    incomplete = [index for batch in StepBatches(23, 4, 0, 5, seed=1) for _, index in batch]
    assert len(set(incomplete)) == 20  # the last three of an epoch are dropped


def test_a_batch_larger_than_the_set_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 32 images over all processes exceeds the 23"):
        StepBatches(23, 16, 0, 1, seed=0, processes=2)


@pytest.mark.parametrize(("rule", "place"), [("center", 0.5), ("nearest", 0.0)])
def test_labels_of_one_pixel_against_a_loop(rule: str, place: float) -> None:
    """The pixel at the centre of the patch, or at its top left corner."""
    for side, grid in ((224, (28, 28)), (32, (5, 8)), (30, (7, 7))):
        masks = torch.rand(2, side, side, generator=torch.Generator().manual_seed(0)) > 0.7
        labels = token_labels(masks, grid, rule)
        assert labels.dtype == torch.bool
        for y in range(grid[0]):
            for x in range(grid[1]):
                pixel = int((y + place) * side / grid[0]), int((x + place) * side / grid[1])
                assert torch.equal(labels[:, y, x], masks[:, pixel[0], pixel[1]])


@pytest.mark.parametrize(("side", "grid", "pixels"), [(224, 28, 32), (224, 16, 32), (112, 14, 8), (448, 28, 32)])
def test_counted_labels_against_a_loop(side: int, grid: int, pixels: int) -> None:
    """More than ``pixels`` of the patch, counted as if the image were 224 px; exactly that many are not enough."""
    patch = side // grid
    rng = np.random.default_rng(0)
    masks = np.zeros((2, side, side), bool)
    limit = pixels * (side / 224) ** 2
    for b in range(2):
        for y in range(grid):
            for x in range(grid):
                count = int(limit) + int(rng.integers(-2, 3))
                own = np.zeros(patch * patch, bool)
                own[rng.permutation(patch * patch)[:count]] = True
                masks[b, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch] = own.reshape(patch, patch)
    counts = masks.reshape(2, grid, patch, grid, patch).sum((2, 4))
    expected = torch.from_numpy(counts > limit)
    assert 0 < expected.float().mean() < 1
    assert torch.equal(token_labels(torch.from_numpy(masks), (grid, grid), "pixels", pixels), expected)


def test_an_unknown_label_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="'majority' is unknown; choose one of center, nearest, pixels"):
        token_labels(torch.zeros(1, 8, 8), (2, 2), "majority")


def test_a_defect_without_a_mask_is_refused(samples: list[Sample]) -> None:
    bare = replace(samples[6], mask=None)
    with pytest.raises(ValueError, match=r"cap_C1_6\.png is a defect without a mask"):
        PretrainingSet([*samples[:6], bare], PREPROCESS, [1], seed=3)
