"""A camera of 12 bits, whose photographs lie in 16-bit files: all that reads a data set sees what its 8-bit twin gives.
Every 8-bit value v is stored as 4095 / 255 v, so that the twins are equal to the last bit.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from adpretrain.backbones import load_backbone
from adpretrain.data import ImageDataset, Sample, index_dataset, index_with_bare
from adpretrain.data.products import LOOKED_AT
from adpretrain.data.shard_writer import write_shards
from adpretrain.data.shards import Shards
from adpretrain.extractor import ADExtractor
from adpretrain.preprocess import Preprocess
from adpretrain.training.cache import CachedBatches
from adpretrain.training.dataset import PretrainingSet, StepBatches
from adpretrain.training.loader import ImageBatch, Request
from adpretrain.training.streamed import StreamedBatches, StreamedSet
from downstream.cli import main

PREPROCESS = Preprocess(32)


def wide(values: np.ndarray, top: float = 4095) -> Image.Image:
    return Image.fromarray(np.rint(values * (top / 255)).astype(np.uint16))


@pytest.fixture(scope="module")
def twins(tile_products: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The products in gray: slab of 12 bits and tile of 8, and the same with both of 8."""
    roots = [tmp_path_factory.mktemp(name) for name in ("twelve", "eight")]
    for file in sorted(tile_products.rglob("*.png")):
        picture = Image.open(file).convert("L")
        for root in roots:
            target = root / file.relative_to(tile_products)
            target.parent.mkdir(parents=True, exist_ok=True)
            deep = root == roots[0] and target.is_relative_to(root / "slab") and "ground_truth" not in target.parts
            (wide(np.asarray(picture, float)) if deep else picture).save(target)
    return roots


def test_the_full_scale_is_that_of_the_products_normals(twins: list[Path]) -> None:
    twelve, eight = (index_dataset("auto", root) for root in twins)
    assert {(s.category, s.full_scale) for s in twelve} == {("slab", 4095.0), ("tile", None)}
    assert {s.full_scale for s in eight} == {None}
    for one, other in zip(ImageDataset(twelve, PREPROCESS), ImageDataset(eight, PREPROCESS), strict=True):
        assert torch.equal(one["image"], other["image"])


def evaluate(root: Path, out: Path) -> dict[str, dict[str, Any]]:
    """The files of cells -> what was measured."""
    flags = ["--backbone", "lite0", "--image-size", "64", "--shots", "2", "--draws", "1", "--device", "cpu"]
    assert main(["evaluate", "--root", str(root), *flags, "--out", str(out)]) == 0
    found = {}
    for file in (out / "cells").iterdir():
        (record,) = json.loads(file.read_text())["records"]
        found[file.name] = {name: record[name] for name in ("product", "metrics", "scores", "labels", "notes", "pro")}
    return found


def test_evaluate_gives_the_scores_of_the_8_bit_twin(twins: list[Path], tmp_path: Path) -> None:
    twelve, eight = (evaluate(root, tmp_path / root.name) for root in twins)
    assert sorted(twelve.values(), key=str) == sorted(eight.values(), key=str)
    assert [twelve[name]["product"] for name in twelve.keys() & eight.keys()] == ["tile"]


def test_a_finished_cell_is_not_taken_for_one_of_another_full_scale(twins: list[Path], tmp_path: Path) -> None:
    """The file that is changed keeps its name and its size."""
    shutil.copytree(twins[0] / "slab" / "ground_truth", tmp_path / "slab" / "ground_truth")
    for split in ("train", "test"):
        for file in (twins[0] / "slab" / split).rglob("*.png"):
            target = (tmp_path / file.relative_to(twins[0])).with_suffix(".tif")
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(file).save(target)
    assert len(evaluate(tmp_path / "slab", tmp_path / "out")) == 1
    first = min((tmp_path / "slab" / "train" / "good").iterdir())
    values, size = np.asarray(Image.open(first)).copy(), first.stat().st_size
    values[0, 0] = 5000
    Image.fromarray(values).save(first)
    assert first.stat().st_size == size
    assert len(evaluate(tmp_path / "slab", tmp_path / "out")) == 2


def marked(root: Path) -> list[Sample]:
    return [sample for sample in index_dataset("auto", root) if not sample.anomalous or sample.mask]


def same(one: ImageBatch, other: ImageBatch) -> bool:
    pairs = [(one.views, other.views), (one.masks, other.masks)]
    pairs += [(a[1], b[1]) for a, b in zip(one.units, other.units, strict=True)]
    return one.keys == other.keys and all(torch.equal(*pair) for pair in pairs)


def test_pretraining_sees_the_batches_of_the_8_bit_twin(twins: list[Path]) -> None:
    """Also resumed at another step, and in the residual cache; the digests, kept with a run, tell the twins apart."""
    sets = [PretrainingSet(marked(root), PREPROCESS, [1, 3], seed=3) for root in twins]
    for start in (0, 2):
        for keys in StepBatches(len(sets[0]), 8, start, 4, seed=3):
            assert same(*(data.load(Request(keys)) for data in sets))
    assert sets[0].digest() != sets[1].digest()
    extractor, once = ADExtractor(load_backbone("lite0", image_size=64)), "none"
    sets = [PretrainingSet(marked(root), extractor.preprocess, [2], seed=3, augment=once) for root in twins]
    cached = [CachedBatches(extractor, data, torch.device("cpu"), draws=1) for data in sets]
    assert all(torch.equal(*levels) for levels in zip(*(each.levels for each in cached), strict=True))


def test_shards_keep_the_full_scale(twins: list[Path], tmp_path: Path) -> None:
    streams = []
    for root in twins:
        shards = Shards(write_shards(marked(root), tmp_path / root.name, 2, references=4))
        data = StreamedSet(shards, PREPROCESS, [1, 3], seed=3)
        streams.append([data.load(Request(draws)) for draws in StreamedBatches(data, 8, 0, 4)])
        held = {sample.category: sample.full_scale for sample in shards.samples("references")}
        assert held == {"slab": 4095.0 if root == twins[0] else None, "tile": None}
    assert all(same(*batches) for batches in zip(*streams, strict=True))


def test_up_to_64_normals_are_looked_at_and_what_exceeds_them_is_told_once(tmp_path: Path) -> None:
    good = tmp_path / "cap" / "train" / "good"
    good.mkdir(parents=True)
    for number in range(2 * LOOKED_AT):
        wide(np.full((8, 8), 200.0), 4095 if number == 1 else 1023).save(
            good / f"{number:03}.png"
        )  # 0, 2, ... are read
    (tmp_path / "cap" / "test" / "good").mkdir(parents=True)
    wide(np.full((8, 8), 100.0), 1023).save(tmp_path / "cap" / "test" / "good" / "000.png")
    samples = [sample for sample in index_with_bare("mvtec", tmp_path)[0] if sample.split == "train"]
    assert {sample.full_scale for sample in samples} == {1023.0}
    assert index_with_bare("mvtec", tmp_path)[0][: len(samples)] == samples
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        brightest = [sample.read().getextrema()[0][1] for sample in samples for _ in range(2)]
    assert sorted(brightest) == [200] * (2 * len(samples) - 2) + [255] * 2
    assert [str(item.message) for item in caught] == [
        "some photographs of cap have values above 1023, the full scale found from its normal photographs, and are "
        "white there"
    ]


def test_a_product_without_a_full_scale_is_named(tmp_path: Path) -> None:
    good = tmp_path / "cap" / "train" / "good"
    (tmp_path / "cap" / "test" / "good").mkdir(parents=True)
    good.mkdir(parents=True)
    for folder in (good, tmp_path / "cap" / "test" / "good"):
        wide(np.full((8, 8), 200.0)).save(folder / "0.tif")
        Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(folder / "1.tif")
    with pytest.raises(ValueError, match="cap: some photographs hold floats and others integers"):
        index_dataset("mvtec", tmp_path)


def test_a_photograph_above_the_full_scale_is_not_called_a_covered_lens(tmp_path: Path) -> None:
    """Normals of 8 bits in 16-bit files, and one photograph saved with 12: it is white throughout, and that is said."""
    draw = np.random.default_rng(0)
    for folder, count, top in (("good", 4, 255), ("new", 1, 4095)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            wide(draw.integers(60, 200, (48, 48)).astype(float), top).save(tmp_path / folder / f"{number}.png")
    flags = ["--normal", str(tmp_path / "good"), "--images", str(tmp_path / "new"), "--image-size", "64"]
    assert main(["score", *flags, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 3
    assert "its values lie above the full scale of the normal" in (tmp_path / "out" / "scores.csv").read_text()
