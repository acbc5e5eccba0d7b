"""The scripts of examples/, as their users run them."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from adpretrain import ADExtractor
from downstream.inspection.photos import prepare_photo
from downstream.inspection.set_up import inspector_from_photos

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a script in ``tmp_path`` as ``python examples/SCRIPT ARGUMENTS`` does; its exit code and what it says."""
    monkeypatch.chdir(tmp_path)

    def started(script: str, *arguments: str) -> tuple[int, str]:
        path = str(ROOT / "examples" / script)
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        code: int | str | None = 0
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        said = "".join(capsys.readouterr())
        return (1, said + code) if isinstance(code, str) else (code or 0, said)

    return started


def frames(count: int, bad: int) -> list[np.ndarray]:
    """Blurred noise in one place, as a part before a camera at rest; frame ``bad`` has a white mark."""
    part = cv2.GaussianBlur(np.random.default_rng(0).uniform(60, 180, (96, 128, 3)), (0, 0), 2)
    drawn = []
    for number in range(count):
        frame = part + np.random.default_rng(number + 1).normal(0, 3, part.shape)
        if number == bad:
            frame[30:46, 50:66] = 255
        drawn.append(np.clip(frame, 0, 255).astype(np.uint8))
    return drawn


def clip(path: Path, pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Write a video, and return its frames as they are read again."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 25, (128, 96))
    for picture in pictures:
        writer.write(picture)
    writer.release()
    camera = cv2.VideoCapture(str(path))
    read = [camera.read()[1] for _ in pictures]
    assert camera.read()[1] is None
    return read


def test_camera(run: Run, tmp_path: Path) -> None:
    """A drawn clip of twelve frames, the last six of which are inspected: one has a mark."""
    known = clip(tmp_path / "good.avi", frames(6, bad=-1))
    clip(tmp_path / "line.avi", frames(12, bad=9)[6:])
    extractor = ADExtractor.from_pretrained("embedded", image_size=64)
    pictures = [Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)) for frame in known]
    photos = [prepare_photo(Path(f"{n}.png"), picture, extractor.preprocess) for n, picture in enumerate(pictures)]
    inspector = inspector_from_photos(extractor, torch.device("cpu"), photos)
    inspector.save(tmp_path / "lid")
    code, said = run("camera.py", "lid", "line.avi")
    assert code == 1, said
    assert "frame 4: score" in said
    assert "of 6 frames are anomalous" in said
    assert (tmp_path / "frame-000004.png").is_file()
    code, said = run("camera.py", "lid", "missing.avi")
    assert code == 1
    assert "cannot open missing.avi: give a video file, or the number of a camera" in said


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Six good photographs, and four new ones, the second of which has a mark."""
    pictures = frames(10, bad=7)
    for name, some in (("good", pictures[:6]), ("new", pictures[6:])):
        (tmp_path / name).mkdir()
        for number, picture in enumerate(some):
            cv2.imwrite(str(tmp_path / name / f"{number}.png"), picture)
    return tmp_path


def test_few_shot(run: Run, folders: Path) -> None:
    code, said = run("few_shot.py", "good", "new")
    assert code == 0, said
    assert "anomalous" in next(line for line in said.splitlines() if line.startswith("1.png"))
    assert "at most 14% of good photographs exceed it" in said


@pytest.mark.parametrize("script", ["swap_features.py", "own_backbone.py"])
def test_the_marked_photograph_scores_highest(script: str, run: Run, folders: Path) -> None:
    code, said = run(script, "good", "new")
    assert code == 0, said
    rows = [line.split() for line in said.splitlines() if line.endswith(".png")]
    for column in range(len(rows[0]) - 1):
        assert max(rows, key=lambda row: float(row[column]))[-1] == "1.png"


@pytest.mark.slow
def test_pretrain_own(run: Run, tile_products: Path) -> None:
    options = ["--image-size=64", "--steps=2", "--batch-size=4", "--references=8", "--shots=2", "--workers=0"]
    code, said = run("pretrain_own.py", str(tile_products), "mine", *options)
    assert code == 3, said
    assert "mine: without a projector; use it with" in said


def test_every_example_is_run_and_short() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    for path in sorted((ROOT / "examples").glob("*.py")):
        assert f'"{path.name}"' in tests, path.name
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 40, path.name
