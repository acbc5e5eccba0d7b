"""A tiny synthetic set and the flags of the pretraining command on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from products import make_synthetic
from running import ROOT


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_synthetic(tmp_path_factory.mktemp("tiny"), 6, 6, 4, size=128, seed=3, workers=1, progress=False)


@pytest.fixture(scope="session")
def arguments(tiny_set: Path) -> Callable[..., list[str]]:
    """The pretraining command's flags for the tiny set, with further ones."""

    def build(run: Path, *flags: str) -> list[str]:
        fixed = ["--config", str(ROOT / "recipes" / "configs" / "demo.yaml"), "--run", str(run)]
        fixed += ["--data.root", str(tiny_set), "--cache.folder", "", "--shots", "[1,3]", "--optim.batch_size", "8"]
        fixed += ["--data.workers", "0"]
        return [*fixed, "--projector.references", "16", "--tracker", "false", "--log_every", "1", *flags]

    return build


@pytest.fixture
def refusal(capfd: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """What the recipe, run in this process, says of a mistake in its flags, on one line."""

    def run(argv: list[str]) -> str:
        import pretrain as recipe

        assert recipe.main(argv) == 2
        said = " ".join(capfd.readouterr().err.split())
        assert "Traceback" not in said
        return said

    return run


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Two products in the layout of MVTec, of one size and of noise-free grey."""
    for category in ("bolt", "nut"):
        for index, place in enumerate(("train/good", "train/good", "test/good", "test/dent")):
            folder = tmp_path / "set" / category / place
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (40 * index, 90, 90)).save(folder / f"{index}.png")
        mask = Image.new("L", (64, 64))
        mask.paste(255, (8, 8, 24, 24))
        (tmp_path / "set" / category / "ground_truth" / "dent").mkdir(parents=True)
        mask.save(tmp_path / "set" / category / "ground_truth" / "dent" / "3_mask.png")
    return tmp_path / "set"
