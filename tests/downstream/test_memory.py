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
import logging, sys, torch, timm.optim
from torch import Tensor
from downstream.neighbours import Neighbours
from downstream.embedding import EmbeddingConfig
from downstream.padim import PaDiM, PaDiMConfig
from downstream.patchcore import PatchCore, PatchCoreConfig
from downstream.reconpatch import ReConPatch, ReConPatchConfig
from downstream.representation import RepresentationConfig
from downstream.spade import SPADE

class Batches:
    def __len__(self): return {batches}
    def __iter__(self):
        for number in range({batches}):
            yield torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(number))

def extract(images: Tensor) -> list[Tensor]:
    maps = torch.nn.functional.adaptive_avg_pool2d(images, {grid})
    return [torch.cat([maps * (k + 1) for k in range({width})], 1)]

logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
detector = {detector}
def status(name): return 1024 * int(open("/proc/self/status").read().split(name + ":")[1].split()[0])
extract(torch.rand(4, 3, 64, 64))
Neighbours(torch.rand(4, 3))  # imports faiss
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak of the imports
before = status("VmRSS")
detector.fit(Batches())
print("measured", status("VmHWM") - before)
"""
PLAIN = "EmbeddingConfig(patch=1)"
FITS = {  # detector, batches of 4 images, grid, channels / 3
    "patchcore": (f"PatchCore(extract, PatchCoreConfig({PLAIN}, amount=20, projection_dim=32))", 100, 32, 64),
    "spade": ("SPADE(extract)", 100, 32, 64),
    "padim, many images": (f"PaDiM(extract, PaDiMConfig({PLAIN}))", 40, 32, 40),
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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc to read the peak from")
@pytest.mark.parametrize("name", FITS)
def test_what_is_said_is_what_is_taken(name: str) -> None:
    detector, batches, grid, width = FITS[name]
    code = CHILD.format(detector=detector, batches=batches, grid=grid, width=width)
    # The Makefile lets the allocator keep freed memory, and by itself it keeps some: neither is to be weighed.
    strict = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200, env=strict)
    said = [float(number) * UNITS[unit] for number, unit in re.findall(r"will hold about ([\d.]+) (\w+)", run.stdout)]
    measured = int(re.findall(r"measured (\d+)", run.stdout)[0])
    print(name, [round(value / 2**20) for value in said], round(measured / 2**20))
    assert max(said) / FACTOR <= measured <= FACTOR * max(said) + BESIDE
    assert measured > 80 << 20  # else the test weighs the allocator


@pytest.mark.parametrize(
    ("detector", "setting", "what", "remedy"),
    [
        ("patchcore", "max_bank_bytes", r"a memory bank of \d+ patches x \d+ channels", "keep a share"),
        ("padim", "max_bytes", r"Gaussians of 6 images at", "embedding.target_dim"),
        ("spade", "max_bank_bytes", r"a memory bank of \d+ patches", "fewer levels"),
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
    command = ["fit", "--backbone=filterbank", "--image-size=64", f"--normal={normal}", f"--detector={detector}"]
    command += [f"--out={tmp_path}/out", "--device=cpu"]
    assert main([*command, "--set", f"{setting}=1000"]) == 2
    said = capfd.readouterr().err
    assert re.search(rf"error: .*{what}.* needs [\d.]+ \w+, more than 1000 bytes: .*{remedy}", said)
    assert not (tmp_path / "out").exists()
    assert main(command) == 0
    found = re.findall(rf"memory: .*{what}.* will hold about [\d.]+ \w+ of [\d.]+ GiB", capfd.readouterr().err)
    assert len(found) == 1
