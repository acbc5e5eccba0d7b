"""The scripts of examples/, as their users run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from adpretrain import ADExtractor
from downstream.inspection.inspector import Inspector
from downstream.inspection.photos import prepare_photo

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: str, folder: Path) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    return found.returncode, found.stdout + found.stderr


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


def test_camera(tmp_path: Path) -> None:
    """A drawn clip of twelve frames, the last six of which are inspected: one has a mark."""
    known = clip(tmp_path / "good.avi", frames(6, bad=-1))
    clip(tmp_path / "line.avi", frames(12, bad=9)[6:])
    extractor = ADExtractor.from_pretrained("embedded", image_size=64)
    pictures = [Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)) for frame in known]
    photos = [prepare_photo(Path(f"{n}.png"), picture, extractor.preprocess) for n, picture in enumerate(pictures)]
    inspector = Inspector.from_photos(extractor, torch.device("cpu"), photos)
    inspector.save(tmp_path / "lid")
    code, said = run("camera.py", "lid", "line.avi", folder=tmp_path)
    assert code == 1, said
    assert "frame 4: score" in said
    assert "of 6 frames are anomalous" in said
    assert (tmp_path / "frame-000004.png").is_file()
    code, said = run("camera.py", "lid", "missing.avi", folder=tmp_path)
    assert code == 1
    assert "cannot open missing.avi: give a video file, or the number of a camera" in said
