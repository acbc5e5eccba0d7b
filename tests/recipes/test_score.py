"""`recipes/score.py`: several processes write the bytes of one, and go on after one of them was killed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import score
import torch
from PIL import Image
from processes import output, start, wait

from adpretrain.data import Sample
from adpretrain.data.shard_writer import write_shards
from downstream.inspection import share as sharing
from downstream.inspection.entry import Entry


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    draw = np.random.default_rng(0)
    for place, count in (("good", 4), ("line", 11)):
        (tmp_path / place).mkdir()
        for number in range(count):
            pixels = np.clip(120 + draw.normal(0, 15, (48, 64, 3)), 0, 255).astype(np.uint8)
            if place == "line" and number % 4 == 3:
                pixels[10:22, 20:32] = 255
            Image.fromarray(pixels).save(tmp_path / place / f"{number:02}.png")
    options = ["--batch-size", "2", "--image-size", "64", "--device", "cpu", "--false-alarm-rate", "0.2"]
    return ["--normal", str(tmp_path / "good"), "--images", str(tmp_path / "line"), *options]


def content(out: Path) -> dict[str, bytes]:
    """All files, without the time a run took and the time of day."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    summary = json.loads(found["summary.json"])
    summary["seconds"] = 0
    found["summary.json"] = json.dumps(summary).encode()
    found["report.html"] = re.sub(rb"on \d{4}-\d\d-\d\d \d\d:\d\d", b"", found["report.html"])
    return found


def share(rank: int, arguments: list[str]) -> None:
    torch.set_num_threads(1)  # as accelerate does for several processes; the last bits depend on it
    raise SystemExit(score.main(arguments))


@pytest.fixture
def in_shards(folders: list[str], tmp_path: Path) -> list[str]:
    """The same command for the same photographs in shards, shuffled."""
    files = sorted((tmp_path / "line").iterdir())
    samples = [Sample(path, None, "line", "good", None, "train", False) for path in files]
    write_shards(samples, tmp_path / "shards", 3, references=2)
    return [str(tmp_path / "shards") if one == str(tmp_path / "line") else one for one in folders]


def killed(rank: int, arguments: list[str]) -> None:
    """The second process ends, without a word, in its second batch."""
    if rank == 1:
        whole, count = sharing.score_batch, [0]

        def score_batch(*given: object) -> list[Entry]:
            count[0] += 1
            if count[0] == 2:
                os._exit(9)
            return whole(*given)  # type: ignore[arg-type]

        sharing.score_batch = score_batch  # type: ignore[assignment]
    share(rank, arguments)


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_write_the_bytes_of_one(processes: int, folders: list[str], tmp_path: Path) -> None:
    one = start(1, tmp_path / "log", share, [*folders, "--out", str(tmp_path / "one")])
    assert wait(one, tmp_path / "log", None) == [1], output(tmp_path / "log")
    started = start(processes, tmp_path / "log", share, [*folders, "--out", str(tmp_path / "several")])
    codes = wait(started, tmp_path / "log", None)
    assert codes == [1] + [0] * (processes - 1), output(tmp_path / "log")
    assert content(tmp_path / "several") == content(tmp_path / "one")


@pytest.mark.parametrize("source", ["folders", "in_shards"])
def test_a_killed_process_does_not_lose_what_was_scored(
    source: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folders: list[str] = request.getfixturevalue(source)
    one = start(1, tmp_path / "log", share, [*folders, "--out", str(tmp_path / "one")])
    assert wait(one, tmp_path / "log", None) == [1], output(tmp_path / "log")
    given = [*folders, "--out", str(tmp_path / "several")]
    codes = wait(start(2, tmp_path / "log", killed, given), tmp_path / "log", None)
    assert codes[1] == 9
    assert codes[0] != 0
    assert not (tmp_path / "several" / "summary.json").exists()
    assert len(list((tmp_path / "several").glob("scores.part*.jsonl"))) == 2
    codes = wait(start(3, tmp_path / "more", share, [*given, "--resume"]), tmp_path / "more", None)
    assert codes == [1, 0, 0], output(tmp_path / "more")
    assert content(tmp_path / "several") == content(tmp_path / "one")
