"""A saved inspector on the line: latency of one photograph after another, and adding one of a hundred references.

Run by `make bench`. The photographs are drawn; times do not depend on what is on them.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from clock import interleaved_cpu_seconds
from PIL import Image

from adpretrain import ADExtractor
from downstream.inspection.inspector import Inspector
from downstream.inspection.photos import Photo, prepare_photo
from downstream.inspection.product import with_photographs
from downstream.inspection.set_up import inspector_from_photos

pytestmark = pytest.mark.benchmark


def drawn(count: int, seed: int) -> list[Image.Image]:
    """Noisy photographs of 448 x 448 pixels."""
    rng = np.random.default_rng(seed)
    small = (Image.fromarray(rng.integers(90, 160, (56, 56, 3), dtype=np.uint8)) for _ in range(count))
    return [image.resize((448, 448)) for image in small]


def prepared(images: list[Image.Image], extractor: ADExtractor) -> list[Photo]:
    return [prepare_photo(Path(f"{n}.png"), image, extractor.preprocess) for n, image in enumerate(images)]


def test_latency_of_the_camera_loop(tmp_path: Path, one_thread: None) -> None:
    """From a photograph in memory to its verdict with regions, for 500 in a row; CPU and wall-clock time."""
    extractor, cpu = ADExtractor.from_pretrained("embedded"), torch.device("cpu")
    inspector_from_photos(extractor, cpu, prepared(drawn(4, 0), extractor)).save(tmp_path / "lid")
    inspector = Inspector.load(tmp_path / "lid")
    used, passed = [], []
    for image in drawn(500, 1):
        began, clock = time.process_time(), time.perf_counter()
        verdict = inspector(image)
        assert verdict.score is not None
        _ = verdict.regions
        used.append(1000 * (time.process_time() - began))
        passed.append(1000 * (time.perf_counter() - clock))
    p50, p99 = np.percentile(used, [50, 99])
    slow50, slow99 = np.percentile(passed, [50, 99])
    print(f"\ninspector(image), K = 4, one thread, 500 photographs: p50 {p50:.0f} ms, p99 {p99:.0f} ms of CPU time")
    print(f"wall clock: p50 {slow50:.0f} ms, p99 {slow99:.0f} ms")
    assert p50 <= 45


def test_adding_one_of_a_hundred_references(one_thread: None) -> None:
    """Against fitting anew on all of them, which gives the same bits."""
    extractor, cpu = ADExtractor.from_pretrained("embedded"), torch.device("cpu")
    photos = prepared(drawn(100, 2), extractor)
    inspector = inspector_from_photos(extractor, cpu, photos[:99])
    anew, added = (
        lambda: inspector_from_photos(extractor, cpu, photos),
        lambda: with_photographs(inspector, photos[99:])[0],
    )
    assert [normal.score for normal in added().normals] == [normal.score for normal in anew().normals]
    seconds = interleaved_cpu_seconds({"anew": anew, "added": added}, repeats=3)
    ratio = seconds["anew"] / seconds["added"]
    print(f"\n100 references anew {seconds['anew']:.1f} s, the hundredth added {seconds['added']:.2f} s: {ratio:.0f} x")
    assert ratio >= 20
