"""Inspecting with the embedded extractor: latency of one photograph, ONNX against torch, throughput and cold start of
`adpretrain score`. CPU time, whose limits are for the machines that the project is built on.

Run by `make bench`. The photographs are drawn; times do not depend on what is on them.
"""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from clock import interleaved_cpu_seconds
from PIL import Image

from adpretrain import ADExtractor
from downstream.detector import Detector
from downstream.detectors import build_detector
from downstream.detectors.featurenorm import FeatureNorm
from downstream.inspection.onnx import export_onnx
from downstream.inspection.resume import PART

pytestmark = pytest.mark.benchmark


def photographs(folder: Path, count: int, seed: int) -> Path:
    """Noisy gray tiles of 448 x 448 pixels as JPEG files, of some ten kB each."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(count):
        small = Image.fromarray(rng.integers(90, 160, (56, 56, 3), dtype=np.uint8))
        small.resize((448, 448)).save(folder / f"{number:03d}.jpg")
    return folder


def fitted(shots: int) -> FeatureNorm:
    images = torch.randn(shots, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return FeatureNorm(ADExtractor.from_pretrained("embedded")).fit([images])


@pytest.mark.parametrize(("shots", "limit"), [(4, 0.045), (16, 0.090)])
def test_latency_of_one_photograph(shots: int, limit: float, one_thread: None) -> None:
    detector, image = fitted(shots), torch.randn(1, 3, 224, 224)
    seconds = interleaved_cpu_seconds({"predict": lambda: detector.predict(image)}, repeats=15)["predict"]
    print(f"\nFeatureNorm.predict, K = {shots}, one photograph, one thread: {1000 * seconds:.0f} ms")
    assert seconds <= limit


def on_the_embedded_extractor(name: str) -> Detector:
    """FeatureNorm with 4 references; another detector is fitted on the residuals of 12 more photographs."""
    generator = torch.Generator().manual_seed(0)
    references, images = (torch.randn(count, 3, 224, 224, generator=generator) for count in (4, 12))
    extractor = ADExtractor.from_pretrained("embedded").set_references(references)
    return build_detector(name, extractor, {}).fit([references if name == "featurenorm" else images])


@pytest.mark.parametrize("name", ["featurenorm", "patchcore", "padim"])
def test_onnx_against_torch(name: str, one_thread: None, tmp_path: Path) -> None:
    detector, image = on_the_embedded_extractor(name), torch.randn(1, 3, 224, 224)
    export_onnx(detector, tmp_path / "inspector.onnx", [image])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(tmp_path / "inspector.onnx", options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: image.numpy()}
    seconds = interleaved_cpu_seconds(
        {"torch": lambda: detector.predict(image), "onnx": lambda: session.run(None, feed)}, 15, statistics.median
    )
    torch_ms, onnx_ms = 1000 * seconds["torch"], 1000 * seconds["onnx"]
    print(f"\n{name}, one photograph, one thread, p50: torch {torch_ms:.0f} ms, ONNX {onnx_ms:.0f} ms")
    assert seconds["onnx"] <= 1.5 * seconds["torch"]


def score(tmp_path: Path, images: Path, out: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "downstream.cli", "score", "--normal", tmp_path / "normal", "--images", images]
    command += ["--out", tmp_path / out, "--false-alarm-rate", "0.2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def cpu_seconds(processes: list[subprocess.Popen[bytes]], before: float) -> float:
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode in (0, 1), errors.decode()
    return _children() - before


def seconds_to_first_scores(tmp_path: Path, images: Path, out: str) -> float:
    """From the command to the first batch on disk."""
    began, process = time.perf_counter(), score(tmp_path, images, out)
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if len((tmp_path / out / PART).read_bytes().splitlines()) > 1:
                break
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    process.communicate()
    return seconds


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_cold_start_and_throughput_of_score(tmp_path: Path) -> None:
    """From the command to the report: 28 photographs, then what 200 more take, in one process and in two at once."""
    photographs(tmp_path / "normal", 4, seed=0)
    few, many = photographs(tmp_path / "few", 28, seed=1), photographs(tmp_path / "many", 228, seed=2)
    score(tmp_path, few, "warm").communicate()  # compiles the byte code
    first = min(seconds_to_first_scores(tmp_path, few, f"first{i}") for i in range(3))
    cold = min(cpu_seconds([score(tmp_path, few, f"few{i}")], _children()) for i in range(3))
    print(f"\ncold start: {first:.1f} s to the first 16 scores and heatmaps;")
    print(f"28 photographs with their report: {cold:.1f} s of CPU time")
    whole = cpu_seconds([score(tmp_path, many, "all")], _children())
    began = time.perf_counter()
    both = cpu_seconds([score(tmp_path, many, f"many{i}") for i in range(2)], _children())
    wall = time.perf_counter() - began
    print(f"throughput: {200 / (whole - cold):.1f} images/s of CPU time; two processes at once:")
    print(f"{400 / (both - 2 * cold):.1f} images/s of CPU time, 456 photographs in {wall:.0f} s")
    assert first <= 6
