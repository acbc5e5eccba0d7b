"""What fitting says it will hold against the peak of a process that does it; how it refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from downstream.cli import main

CHILD = """
import logging, sys, torch
from torch import Tensor
from downstream.neighbours import Neighbours
from downstream.embedding import EmbeddingConfig
from downstream.detectors.anomalydino import AnomalyDINO, AnomalyDINOConfig
from downstream.detectors.musc import MuSc, MuScConfig
from downstream.detectors.padim import PaDiM, PaDiMConfig
from downstream.detectors.patchcore import PatchCore, PatchCoreConfig
from downstream.detectors.reconpatch import ReConPatch, ReConPatchConfig
from downstream.detectors.reconpatch.representation import RepresentationConfig
from downstream.detectors.spade import SPADE
import timm.optim

class Batches:
    def __init__(self, count): self.count = count
    def __len__(self): return self.count
    def __iter__(self):
        for number in range(self.count):
            yield torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(number))

def status(name): return 1024 * int(open("/proc/self/status").read().split(name + ":")[1].split()[0])

def weigh(make, batches, grid, width):
    def extract(images: Tensor) -> list[Tensor]:
        maps = torch.nn.functional.adaptive_avg_pool2d(images, grid)
        return [torch.cat([maps * (k + 1) for k in range(width)], 1)]

    detector = make(extract)
    extract(torch.rand(4, 3, 64, 64))
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak of the imports, and of the fit before
    before = status("VmRSS")
    detector.fit(Batches(batches))
    print("measured", status("VmHWM") - before)

logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
Neighbours(torch.rand(4, 3))  # imports faiss
"""
PLAIN = "EmbeddingConfig(patch=1)"
FITS = {  # detector, batches of 4 images, grid, channels / 3
    "patchcore": (f"PatchCore(extract, PatchCoreConfig({PLAIN}, amount=20, projection_dim=32))", 40, 32, 64),
    "spade": ("SPADE(extract)", 40, 32, 64),
    "anomalydino": ("AnomalyDINO(extract, AnomalyDINOConfig(rotations=2))", 20, 32, 64),
    # Its images compare with each other: their number counts twice.
    "musc": ("MuSc(extract, MuScConfig(degrees=[1]))", 5, 6, 13000),
    "padim, many images": (f"PaDiM(extract, PaDiMConfig({PLAIN}))", 40, 28, 44),
    "reconpatch": (
        f"ReConPatch(extract, ReConPatchConfig(PatchCoreConfig({PLAIN}, amount=20), "
        "RepresentationConfig(dim=16, projection_dim=None, epochs=1, patches_per_step=2500, images_per_step=3)))",
        3,
        32,
        20,
    ),
}
UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
FACTOR = 1.25  # between what is said and what is measured
BESIDE = 40 << 20  # bytes: what a batch takes is not said


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What each fit said and how much it took, one after the other in a process that imports once."""
    fits = [
        f"print('fit', {name!r}); weigh(lambda extract: {detector}, {batches}, {grid}, {width})"
        for name, (detector, batches, grid, width) in FITS.items()
    ]
    # The Makefile lets the allocator keep freed memory, and by itself it keeps some: neither is to be weighed.
    strict = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", "\n".join([CHILD, *fits])]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600, env=strict)
    return dict(zip(FITS, re.split(r"^fit .*$", run.stdout, flags=re.MULTILINE)[1:], strict=True))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc to read the peak from")
@pytest.mark.parametrize("name", FITS)
def test_what_is_said_is_what_is_taken(said: dict[str, str], name: str) -> None:
    announced = [
        float(number) * UNITS[unit] for number, unit in re.findall(r"will hold about ([\d.]+) (\w+)", said[name])
    ]
    measured = int(re.findall(r"measured (\d+)", said[name])[0])
    print(name, [round(value / 2**20) for value in announced], round(measured / 2**20))
    assert max(announced) / FACTOR <= measured <= FACTOR * max(announced) + BESIDE
    assert measured > 80 << 20  # else the test weighs the allocator


@pytest.mark.parametrize(
    ("detector", "setting", "what", "remedy"),
    [
        ("patchcore", "max_bank_bytes", r"a memory bank of \d+ patches x \d+ channels", "keep a share"),
        ("padim", "max_bytes", r"Gaussians of 6 images at", "embedding.target_dim"),
        ("spade", "max_bank_bytes", r"a memory bank of \d+ patches", "fewer levels"),
        ("anomalydino", "max_bank_bytes", r"a memory bank of \d+ patches", "fewer levels"),
        ("musc", "max_bytes", r"the features of 6 images", "fewer levels"),
    ],
)
def test_fit_says_what_it_holds_or_refuses_before_it_does(
    write_tiles: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    detector: str,
    setting: str,
    what: str,
    remedy: str,
) -> None:
    normal = write_tiles("normal", range(6))
    command = ["fit", "--backbone=lite0", "--image-size=64", f"--normal={normal}", f"--detector={detector}"]
    command += [f"--out={tmp_path}/out", "--device=cpu"]
    assert main([*command, "--set", f"{setting}=1000"]) == 2
    said = capfd.readouterr().err
    assert re.search(rf"error: .*{what}.* needs [\d.]+ \w+, more than 1000 bytes: .*{remedy}", said)
    assert not (tmp_path / "out").exists()
    assert main(command) == 0
    found = re.findall(rf"memory: .*{what}.* will hold about [\d.]+ \w+ of [\d.]+ GiB", capfd.readouterr().err)
    assert len(found) == 1
