"""`recipes/fit.py` in two processes: detectors that train a network learn what one process learns from whole steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import output, start, wait
from running import fit
from safetensors.torch import load_file

UNIAD = ["grid=4", "neighbours=3", "width=16", "heads=2", "layers=1", "inner=16", "dropout=0", "jitter=0"]
UNIAD += ["learning_rate=1e-3"]


def stripes(folder: Path, seeds: list[int]) -> Path:
    """Photographs of stripes at any phase, the same for the same seed."""
    folder.mkdir()
    for number, seed in enumerate(seeds):
        rng = np.random.default_rng(seed)
        wave = 120 + 60 * np.sin(np.arange(64) / 3 + rng.uniform(0, 6))[None, :, None]
        pixels = wave + rng.normal(0, 10, (64, 64, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def learnt(normal: Path, at: Path, detector: str, options: list[str], count: int = 1, steps: int = 6) -> torch.Tensor:
    """All weights, in one vector, that ``count`` processes learn in steps of four photographs."""
    at.mkdir()
    argv = ["--detector", detector, "--backbone", "lite0", "--image-size", "64", "--levels", "[1,2,3]"]
    argv += ["--normal", str(normal), "--out", str(at / "fitted"), "--device", "cpu"]
    argv += ["--set", *options, f"training.steps={steps}", "training.batch_size=4"]
    wait(start(count, at / "log", fit, argv), at / "log")
    assert f"{detector} fitted on 8 images" in output(at / "log")
    assert count == 1 or "fitted on" not in output(at / "log", 1)  # one process saves, and says so
    found = load_file(at / "fitted" / "model.safetensors")
    return torch.cat([value.double().flatten() for name, value in sorted(found.items()) if "running" not in name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("detector", "options", "seeds"),
    [("uniad", UNIAD, [*range(8)]), ("rd4ad", ["learning_rate=1e-4"], 8 * [0])],
    ids=["uniad", "rd4ad"],
)
def test_two_processes_learn_what_one_learns(
    detector: str, options: list[str], seeds: list[int], tmp_path: Path
) -> None:
    """They differ by less than a hundredth of what the last of six steps changes: by rounding. A batch norm sees the
    images of its process only, so that this holds for RD4AD where the shares are alike: of one photograph, eight times.
    """
    normal = stripes(tmp_path / "normal", seeds)
    one, two, before = (
        learnt(normal, tmp_path / name, detector, options, count, steps)
        for name, count, steps in (("one", 1, 6), ("two", 2, 6), ("before", 1, 5))
    )
    assert float((two - one).norm()) < 0.01 * float((before - one).norm())
