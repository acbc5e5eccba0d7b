"""Phases of a step, FLOPs, MFU."""

from __future__ import annotations

import time

import pytest
import torch

from adpretrain.backbones import load_backbone
from adpretrain.projector import FeatureProjector
from adpretrain.training.speed import Stopwatch, Throughput, count_flops, peak_flops, peak_of

CPU = torch.device("cpu")


def test_every_moment_belongs_to_the_phase_that_began_last() -> None:
    began = time.perf_counter()
    watch = Stopwatch(CPU)
    for phase, wait in (("data", 0.02), ("backbone", 0.06), ("data", 0.03), ("loss", 0.01)):
        watch(phase)
        time.sleep(wait)
    seconds = watch.seconds()
    elapsed = time.perf_counter() - began
    assert 0.12 <= sum(seconds.values()) <= elapsed  # a busy machine may stop us between any two lines
    for phase, wait in (("data", 0.05), ("backbone", 0.06), ("loss", 0.01)):
        assert wait <= seconds[phase] <= wait + elapsed - 0.12  # sleep never wakes early
    time.sleep(0.01)
    assert watch.seconds()["loss"] >= 0.01  # the last phase goes on


def test_rates_and_shares_of_a_line_and_of_all_lines() -> None:
    speed = Throughput(Stopwatch(CPU), peak=1e6)
    layer, images = torch.nn.Linear(10, 20), torch.zeros(5, 10)
    speed.count(lambda: layer(images[:1]), lambda: layer(images))
    began = first = time.perf_counter()
    speed.restart()
    for wait, encoded in ((0.05, 30), (0.1, 60)):
        speed.watch("projector")
        speed.add(images=8, encoded=encoded)
        time.sleep(wait)
        before = time.perf_counter()
        line = speed.line()
        after = time.perf_counter()
        elapsed, began = after - began, before  # with all that a busy machine may have added to the wait
        assert 8 / elapsed <= line["images_per_s"] <= 8 / wait
        flops = 2 * 10 * 20 * (encoded + 3 * 5)  # a multiply-add is two; the backward pass twice the forward
        assert flops / elapsed / 1e6 <= line["mfu"] <= flops / wait / 1e6
        assert sum(share for key, share in line.items() if key.startswith("time_")) == pytest.approx(1)
    assert 0.99 * 16 / (after - first) <= float(speed.summary().split()[0]) <= 1.01 * 16 / 0.15  # it is rounded
    assert "time: projector" in speed.summary()
    assert "MFU unknown" not in speed.summary()


def test_flops_of_the_paper_s_networks() -> None:
    """DINOv2-base at 224 px: 46 GFLOP an image; the projector 47 with keys and values for one image, of which 28 are
    shared by a batch of 32 images and 2 views: 19. Counted without computing."""
    with torch.device("meta"):
        backbone, projector = load_backbone("dinov2-base", pretrained=False), FeatureProjector([768] * 4)
        image = torch.empty(1, 3, 224, 224)
        residuals = [torch.empty(64, 768, 16, 16) for _ in range(4)]
    with torch.no_grad():
        assert count_flops(lambda: backbone(image)) / 1e9 == pytest.approx(46.3, abs=0.1)
        assert count_flops(lambda: projector([level[:1] for level in residuals])) / 1e9 == pytest.approx(47.5, abs=0.1)
        forward = count_flops(lambda: projector(residuals))
    assert forward / 64e9 == pytest.approx(19.0, abs=0.1)
    both = count_flops(lambda: torch.stack([level.sum() for level in projector(residuals)]).sum().backward())
    assert both / forward == pytest.approx(3, abs=0.1)  # the first layer's input needs no gradient


def test_an_unknown_device_has_no_peak() -> None:
    assert peak_flops(CPU, half=True) is None
    speed = Throughput(Stopwatch(CPU))
    speed.add(1, 1)
    assert "mfu" not in speed.line()
    assert "MFU" not in speed.summary()  # of a CPU nobody asks


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA L4", 121, 30.3),
        ("Tesla V100-SXM2-16GB", 125, 15.7),
        ("NVIDIA L40", None, None),
        ("NVIDIA A10G", None, None),
        ("NVIDIA T400 4GB", None, None),
    ],
)
def test_a_device_is_not_taken_for_one_of_a_similar_name(name: str, half: float | None, single: float | None) -> None:
    """Names as the driver gives them; TFLOP/s of the data sheets."""
    for expected, found in ((half, peak_of(name, True)), (single, peak_of(name, False))):
        assert found == (expected and pytest.approx(1e12 * expected))
