"""A watched folder: every file is scored exactly once, however the watcher ends and however slowly files grow."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adpretrain import ADExtractor
from downstream.inspection import Options
from downstream.inspection.inspector import Inspector
from downstream.inspection.set_up import inspector_from_folder
from downstream.inspection.watch import FolderWatch

SIDE = 64


def photograph(seed: int) -> Image.Image:
    draw = np.random.default_rng(seed)
    return Image.fromarray(np.clip(120 + draw.normal(0, 20, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    for number in range(4):
        photograph(number).save(folder / f"{number}.png")
    extractor = ADExtractor.from_pretrained("embedded", image_size=SIDE)
    inspector = inspector_from_folder(extractor, torch.device("cpu"), folder, options=Options(0.2))
    return inspector.save(tmp_path_factory.mktemp("product") / "saved")


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def start(product: Path, folder: Path, out: Path) -> subprocess.Popen[bytes]:
    code = "import sys; from downstream.cli import main; sys.exit(main())"
    arguments = ["watch", "--at", product, "--folder", folder, "--out", out, "--device", "cpu", "--patience", "2"]

    def interruptible() -> None:  # a test run in the background of a shell ignores Ctrl-C, and so would its children
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=interruptible)


def wait_for(out: Path, count: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (out / "scores.csv").exists() and len(rows(out)) >= count:
            return
        time.sleep(0.2)
    raise AssertionError(f"{len(rows(out)) if (out / 'scores.csv').exists() else 0} of {count} photographs were scored")


def kills(product: Path, tmp_path: Path, files: int, times: int) -> None:
    """Drop files at random while the watcher is killed; none may be lost, and none scored twice."""
    folder, out, draw = tmp_path / "incoming", tmp_path / "out", np.random.default_rng(0)
    folder.mkdir()
    done = 0
    for _ in range(times):
        watcher = start(product, folder, out)
        for _ in range(files // times):
            photograph(100 + done).save(folder / f"{done:03}.png")
            done += 1
            time.sleep(float(draw.uniform(0, 0.1)))
        time.sleep(float(draw.uniform(0, 6)))
        watcher.send_signal(signal.SIGKILL)
        watcher.communicate()
    watcher = start(product, folder, out)
    try:
        assert watcher.stdout is not None
        assert watcher.stdout.readline().startswith(b"watching")  # it may be interrupted from now on
        wait_for(out, done, 300 + files)
        time.sleep(1)
    finally:
        watcher.send_signal(signal.SIGINT)
    watcher.communicate(timeout=300)
    assert watcher.returncode == 0
    found = [row["path"] for row in rows(out)]
    assert sorted(found) == [f"{number:03}.png" for number in range(done)]
    lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()][1:]
    assert len({line["file"][0] for line in lines}) == len(lines) == done
    assert len(list((out / "heatmaps").glob("*.png"))) == done
    assert not list(out.rglob("*.tmp*"))


def test_nothing_is_lost_or_scored_twice(product: Path, tmp_path: Path) -> None:
    kills(product, tmp_path, files=24, times=3)


@pytest.mark.long
def test_nothing_is_lost_or_scored_twice_in_twenty_kills(product: Path, tmp_path: Path) -> None:
    kills(product, tmp_path, files=500, times=20)


def take_ready(watch: FolderWatch, seconds: float, count: int | None = None) -> list[tuple[str, str]]:
    """What is taken within the time, or until there are ``count``."""
    found, end = list[tuple[str, str]](), time.monotonic() + seconds
    while time.monotonic() < end and len(found) != count:
        for file in watch.ready():
            found += [(result.path, result.verdict) for result in watch.taken(file)]
        time.sleep(0.05)
    return found


def test_half_written_files_wait_and_broken_ones_are_reported(product: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "incoming", tmp_path / "out"
    folder.mkdir()
    photograph(50).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    with FolderWatch(Inspector.load(product), folder, out, patience=8) as watch:
        (folder / "slow.png").write_bytes(content[:2000])
        (folder / "notes.txt").write_text("no photograph")
        assert take_ready(watch, 1) == []
        (folder / "slow.png").write_bytes(content)
        assert [path for path, _ in take_ready(watch, 60, 1)] == ["slow.png"]
        (folder / "broken.png").write_bytes(content[:2000])
        assert take_ready(watch, 1) == []
        assert take_ready(watch, 60, 1) == [("broken.png", "unreadable")]
        os.utime(folder / "slow.png", (0, 0))  # touched: the same photograph is not scored again
        assert take_ready(watch, 1) == []
        photograph(51).save(folder / "slow.png")  # written over: another photograph
        assert [path for path, _ in take_ready(watch, 60, 1)] == ["slow.png"]
    assert [row["path"] for row in rows(out)] == ["slow.png", "broken.png", "slow.png"]


def test_wrong_folders_are_refused(product: Path, tmp_path: Path) -> None:
    inspector = Inspector.load(product)
    (tmp_path / "incoming").mkdir()
    with pytest.raises(ValueError, match="no such folder"):
        FolderWatch(inspector, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match="lies in the output folder"):
        FolderWatch(inspector, tmp_path / "incoming", tmp_path)
    first, second = (FolderWatch(inspector, tmp_path / "incoming", tmp_path / "out") for _ in range(2))
    with first, pytest.raises(ValueError, match="another process watches"):
        second.__enter__()
    (tmp_path / "other").mkdir()
    with (
        pytest.raises(ValueError, match="give another --out for another folder"),
        FolderWatch(inspector, tmp_path / "other", tmp_path / "out"),
    ):
        pass
