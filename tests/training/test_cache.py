"""Residuals that several processes of one machine compute together: the bytes of one process, held once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import together
from products import make_synthetic

from adpretrain.backbones import load_backbone
from adpretrain.data.layouts.realiad import index_realiad
from adpretrain.extractor import ADExtractor
from adpretrain.training.cache import ALONE, CachedBatches, LocalProcesses, local_processes
from adpretrain.training.dataset import PretrainingSet

CPU = torch.device("cpu")


def digests(cached: CachedBatches) -> list[str]:
    return [hashlib.sha256(whole.numpy().tobytes()).hexdigest() for whole in (*cached.levels, cached.masks)]


def cache(root: Path, local: LocalProcesses) -> tuple[CachedBatches, int]:
    """The residuals, and how many images went through the backbone here."""
    backbone = load_backbone("lite0", image_size=64)
    encoded = 0

    def count(module: object, inputs: tuple[torch.Tensor]) -> None:
        nonlocal encoded
        encoded += len(inputs[0])

    backbone.register_forward_pre_hook(count)
    data = PretrainingSet(index_realiad(root), backbone.preprocess, [1, 3], seed=5, augment="none")
    return CachedBatches(ADExtractor(backbone), data, CPU, draws=2, local=local), encoded


def cache_together(rank: int, root: Path, folder: Path) -> tuple[list[str], int, float, list[str]]:
    dist.init_process_group("gloo")
    local = local_processes(folder, dist.group.WORLD)
    assert (local.rank, local.count) == (rank, 3)
    cached, encoded = cache(root, local)
    found = digests(cached)
    local.everywhere(True)
    if rank == 0:
        cached.levels[0].fill_(7)  # seen by the others, if it is one memory
    local.everywhere(True)
    return found, encoded, float(cached.levels[0].min()), [path.name for path in folder.iterdir()]


def test_processes_share_the_work_and_the_memory_and_get_the_bytes_of_one(tmp_path: Path) -> None:
    root = make_synthetic(tmp_path / "set", 2, 5, 3, size=128, seed=1, workers=1, progress=False)
    alone, images = cache(root, ALONE)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".shared.0.tmp").write_bytes(b"left by a killed process")
    shared = together(3, tmp_path, cache_together, root, folder)
    assert [found for found, *_ in shared] == [digests(alone)] * 3
    assert sum(encoded for _, encoded, *_ in shared) == images
    assert max(encoded for _, encoded, *_ in shared) == -(-images // 3)
    assert [lowest for *_, lowest, _ in shared] == [7.0] * 3
    assert [left for *_, left in shared] == [[]] * 3


def test_threads_give_the_bytes_of_one(tmp_path: Path) -> None:
    """The views are drawn from torch's generator, which all threads have in common."""
    root = make_synthetic(tmp_path / "set", 2, 5, 3, size=128, seed=1, workers=1, progress=False)
    backbone = load_backbone("lite0", image_size=64)
    data = PretrainingSet(index_realiad(root), backbone.preprocess, [1], seed=5, augment="once")
    one, *others = (
        digests(CachedBatches(ADExtractor(backbone), data, CPU, draws=1, threads=threads)) for threads in (1, 8, 8)
    )
    assert others == [one, one]


def test_a_disk_without_room_is_told_before_anything_is_mapped(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"MiB are needed\): '.*shared\.0\.tmp'"):
        LocalProcesses(0, 2, folder=tmp_path).empty((1 << 40, 1 << 10), torch.float32)
    assert list(tmp_path.iterdir()) == []
