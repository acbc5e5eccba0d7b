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


@pytest.fixture(scope="module")
def normal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight photographs of stripes at any phase."""
    folder = tmp_path_factory.mktemp("normal")
    for seed in range(8):
        rng = np.random.default_rng(seed)
        stripes = 120 + 60 * np.sin(np.arange(64) / 3 + rng.uniform(0, 6))[None, :, None]
        pixels = stripes + rng.normal(0, 10, (64, 64, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{seed}.png")
    return folder


def learnt(normal: Path, at: Path, detector: str, options: list[str], count: int, batch: int) -> torch.Tensor:
    """All weights, in one vector, that ``count`` processes learn in six steps of ``batch`` photographs."""
    at.mkdir()
    argv = ["--detector", detector, "--backbone", "lite0", "--image-size", "64", "--levels", "[1,2,3]"]
    argv += ["--normal", str(normal), "--out", str(at / "fitted"), "--device", "cpu"]
    argv += ["--set", *options, "training.steps=6", f"training.batch_size={batch}"]
    wait(start(count, at / "log", fit, argv), at / "log")
    assert f"{detector} fitted on 8 images" in output(at / "log")
    assert count == 1 or "fitted on" not in output(at / "log", 1)  # one process saves, and says so
    assert not list(at.glob("*.training.pt"))
    found = load_file(at / "fitted" / "model.safetensors")
    weights = [value.double().flatten() for name, value in sorted(found.items()) if "running" not in name]
    return torch.cat(weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("detector", "options", "share"),
    [
        ("uniad", UNIAD, 1e-3),
        ("rd4ad", [], 0.5),
    ],
)
def test_two_processes_learn_what_one_learns(
    detector: str, options: list[str], share: float, normal: Path, tmp_path: Path
) -> None:
    one, two, half = (
        learnt(normal, tmp_path / name, detector, options, count, batch)
        for name, count, batch in (("one", 1, 4), ("two", 2, 4), ("half", 1, 2))
    )
    print(detector, float((two - one).norm()), float((half - one).norm()), float((two - one).abs().max()))
    assert float((two - one).norm()) < share * float((half - one).norm())
