"""Reference draws that several images share, or that come from a pool: what stays as it was and what is tied."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from scipy.stats import chisquare

from adpretrain.config import ReferencesConfig
from adpretrain.data import Sample
from adpretrain.training.dataset import ReferenceDraws, StepBatches

WAYS = [
    ReferencesConfig(),
    ReferencesConfig(together=3),
    ReferencesConfig(pool=5),
    ReferencesConfig(pool=5, refresh=2),
    ReferencesConfig(pool=5, together=3),
]


def samples(normals: int = 7, defects: int = 2) -> list[Sample]:
    """Two categories of two views, mixed; no file is opened."""
    made = []
    for number in range(normals + defects):
        for category in ("cap", "nut"):
            for view in ("C1", "C2"):
                bad = number >= normals
                path, mask = Path(f"{category}{view}{number}"), Path("mask") if bad else None
                made.append(Sample(path, mask, category, "dent" if bad else "good", view, "train"))
    return made


@pytest.mark.parametrize("config", WAYS, ids=str)
def test_references_are_other_normals_of_the_category_and_view(config: ReferencesConfig) -> None:
    data = samples()
    draws = ReferenceDraws(data, [1, 2], seed=1, config=config)
    for epoch in range(40):
        for index, sample in enumerate(data):
            chosen = draws.draw(index, epoch)
            assert len(chosen) in (1, 2)
            assert len({*chosen, index}) == len(chosen) + 1  # distinct, and not the image itself
            for other in chosen:
                assert not data[other].anomalous
                assert (data[other].category, data[other].view) == (sample.category, sample.view)
                assert other in draws.pool(draws.group_of[index], epoch)


@pytest.mark.parametrize("config", WAYS, ids=str)
@pytest.mark.parametrize("index", [0, 32])
def test_over_the_epochs_every_set_of_k_others_is_equally_likely(config: ReferencesConfig, index: int) -> None:
    """A normal image (0) and a defect (32): chi-square of the pairs drawn in 3000 epochs, fixed seed."""
    data = samples()
    draws = ReferenceDraws(data, [2], seed=2, config=config)
    others = [other for other in range(0, 28, 4) if other != index]
    epochs = range(0, 3000 * config.refresh, config.refresh)  # of one pool, one epoch: the draws are independent
    met = Counter(tuple(sorted(draws.draw(index, epoch))) for epoch in epochs)
    pairs = list(combinations(others, 2))
    assert len(pairs) == (21 if data[index].anomalous else 15)
    assert chisquare([met[pair] for pair in pairs]).pvalue > 0.001
    assert sum(met.values()) == 3000


def test_a_block_shares_its_draw_and_its_images_come_together() -> None:
    data = samples()
    draws = ReferenceDraws(data, [1, 2], seed=1, config=ReferencesConfig(together=3))
    keys = [key for batch in StepBatches(len(data), 6, 0, 12, 5, blocks=draws.blocks) for key in batch]
    assert len({*keys}) == len(keys) == 72  # two epochs of 36 images
    for start in range(0, len(keys), 3):  # nine images of a category and view make three whole blocks
        block = keys[start : start + 3]
        assert len({(data[index].category, data[index].view) for _, index in block}) == 1
        assert len({tuple(draws.draw(index, epoch)) for epoch, index in block}) == 1
    blocks = [{frozenset(block) for block in draws.blocks(epoch)} for epoch in (0, 1)]
    assert not blocks[0] & blocks[1]  # others every epoch


def test_a_pool_serves_its_epochs_and_no_longer() -> None:
    draws = ReferenceDraws(samples(), [2], seed=1, config=ReferencesConfig(pool=4, refresh=3))
    pools = [tuple(draws.pool(1, epoch)) for epoch in range(12)]
    assert [len({*pools[start : start + 3]}) for start in (0, 3, 6, 9)] == [1, 1, 1, 1]
    assert len({*pools}) > 2
    assert tuple(draws.pool(0, 0)) != pools[0]
    everything = ReferenceDraws(samples(), [2], seed=1, config=ReferencesConfig(pool=50))
    assert everything.pool(1, 0) == ReferenceDraws(samples(), [2], seed=1).pool(1, 0)


@pytest.mark.parametrize("config", WAYS, ids=str)
@pytest.mark.parametrize("processes", [2, 3])
def test_the_draws_of_several_processes_are_those_of_one(config: ReferencesConfig, processes: int) -> None:
    """Grouping and draws belong to the global batch: the parts of the processes, side by side, are the whole."""
    data = samples()

    def drawn(rank: int, parts: int) -> list[list[tuple[tuple[int, int], list[int]]]]:
        draws = ReferenceDraws(data, [1, 2], seed=1, config=config)  # every process has its own
        steps = StepBatches(len(data), 12 // parts, 0, 6, 5, rank, parts, draws.blocks)
        return [[(key, draws.draw(key[1], key[0])) for key in batch] for batch in steps]

    ranks = [drawn(rank, processes) for rank in range(processes)]
    assert [[item for part in parts for item in part] for parts in zip(*ranks, strict=True)] == drawn(0, 1)


@pytest.mark.parametrize("start", [1, 3, 4])
def test_a_resumed_run_groups_and_draws_as_an_uninterrupted_one(start: int) -> None:
    config = ReferencesConfig(together=2, pool=5)

    def keys(first: int) -> list[list[tuple[int, int]]]:
        draws = ReferenceDraws(samples(), [1, 2], seed=1, config=config)
        return list(StepBatches(36, 8, first, 10, 5, blocks=draws.blocks))

    assert keys(start) == keys(0)[start:]


def test_too_few_normals_for_a_block_are_named() -> None:
    with pytest.raises(ValueError, match=r"K = 2 references need 8 normal images .*too few in cap C1"):
        ReferenceDraws(samples(), [2], seed=1, config=ReferencesConfig(together=6))
