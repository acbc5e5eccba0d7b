"""What pretraining says it will hold against the peak of the process that does it; how it refuses."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from rich.console import Console
from running import ROOT, finish, train

from adpretrain.backbones import load_backbone
from adpretrain.config import BackboneConfig, CacheConfig, DataConfig, OptimConfig, PretrainConfig

UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}
FACTOR = 1.5  # between what is said and what is measured
ONLINE = ["--cache.draws", "0", "--data.workers", "0", "--tokens", "0"]
RUNS = {
    "smallest": ["--optim.batch_size", "2"],
    "two views": [*ONLINE, "--optim.batch_size", "16", "--augment", "epoch", "--loss.lambda_", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_what_is_said_is_what_is_taken(arguments: Callable[..., list[str]], tmp_path: Path, name: str) -> None:
    argv = arguments(tmp_path / "run", *RUNS[name], "--optim.steps", "1", "--optim.epochs", "1")
    process = subprocess.Popen(  # not forked: what it imports is weighed too
        [sys.executable, "recipes/pretrain.py", *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    peak = 0  # not rusage's: that of a new process begins with what the one that started it held
    while process.poll() is None:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        peak = 1024 * int(found[1]) if found else peak
        time.sleep(0.02)
    number, unit = re.findall(r"will hold about ([\d.]+) (\w+)", finish(process))[0]
    print(name, number, unit, "measured", peak >> 20)
    assert peak / FACTOR <= float(number) * UNITS[unit] <= FACTOR * peak


def test_what_cannot_fit_is_refused_with_a_remedy(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    flags = [*ONLINE, "--optim.batch_size", "100000"]
    said = train(tmp_path / "log", arguments(tmp_path / "run", *flags), expected=2)
    assert re.search(r"pretraining \(.*step [\d.]+ GiB.*\) needs [\d.]+ GiB, more than [\d.]+ GiB: ", said)
    assert "optim.batch_size, or tokens: N" in said
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_all_processes_of_a_machine_and_their_reservoirs_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from adpretrain.training.costs import check_memory, count, on_host

    config = PretrainConfig(data=DataConfig("shards", reservoir_mb=3000), optim=OptimConfig(batch_size=1))
    assert on_host(config, count(config), 10)["reservoir"] == 3000 << 20
    said = Console(file=io.StringIO(), width=200)
    cpu = torch.device("cpu")
    held = []
    for processes in (1, 2):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        check_memory(config, 10, 0, processes, cpu, said)
        held.append(float(re.findall(r"about ([\d.]+) GiB", said.file.getvalue())[-1]))
    assert held[1] == pytest.approx(2 * held[0], rel=0.02)  # what is printed is rounded
    cached = PretrainConfig(cache=CacheConfig(draws=1), augment="once", optim=OptimConfig(batch_size=1))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    check_memory(cached, 10_000, 0, 1, cpu, said)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_memory(cached, 10_000, 0, 2, cpu, said)
    one, two = (float(number) for number in re.findall(r"about ([\d.]+) GiB", said.file.getvalue())[-2:])
    cache = on_host(cached, count(cached), 10_000)["residual cache"] / (1 << 30)
    assert two == pytest.approx(2 * one - cache, rel=0.02)  # the cache is shared
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    with pytest.raises(ValueError, match=r"\(1000 processes: .*data.reservoir_mb.*fewer processes on this machine"):
        check_memory(config, 10, 0, 1, cpu, said)


def test_the_features_of_held_out_images_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process keeps them, as many bytes as `encode_samples` gives, where it trains."""
    from adpretrain.training.costs import check_memory

    config = PretrainConfig(backbone=BackboneConfig("lite0", image_size=64), optim=OptimConfig(batch_size=1))
    backbone = load_backbone("lite0", image_size=64)
    each = sum(level.nbytes for level in backbone(torch.zeros(1, 3, 64, 64)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    said = Console(file=io.StringIO(), width=200)
    for count in (0, (4 << 30) // each):
        check_memory(config, 10, count, 2, torch.device("cpu"), said)
    without, with_them = (float(number) for number in re.findall(r"about ([\d.]+) GiB", said.file.getvalue()))
    assert with_them - without == pytest.approx(4, abs=0.11)  # what is printed is rounded
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=SimpleNamespace(total_memory=4 << 30)),
        pytest.raises(ValueError, match=r"\(held-out features 4.* more than 4.0 GiB: fewer data.held_out; or"),
    ):
        check_memory(config, 10, (4 << 30) // each + 1, 2, torch.device("cuda"), said)
