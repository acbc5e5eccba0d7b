"""Pretraining in several processes (gloo, CPU): the same weights as in one, and launches that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import start, wait
from running import pretrain
from safetensors.torch import load_file

Arguments = Callable[..., list[str]]
BOTH_LOSSES = [
    "--augment",
    "once",
    "--loss.lambda_",
    "1.0",
    "--tokens",
    "24",
    "--data.held_out",
    "[]",
]
BOTH_LOSSES += ["--backbone.image_size", "64"]


def pretrain_in_float64(rank: int, argv: list[str]) -> int:
    torch.set_default_dtype(torch.float64)
    return pretrain(rank, argv)


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "extractor" / "model.safetensors")


@pytest.mark.slow
def test_two_processes_write_the_residual_cache_of_one(arguments: Arguments, tmp_path: Path) -> None:
    log, files = tmp_path / "log", []
    for count in (1, 2):
        folder = tmp_path / f"cache{count}"
        flags = [*BOTH_LOSSES, "--cache.folder", str(folder), "--optim.steps", "1"]
        wait(start(count, log, pretrain, arguments(tmp_path / f"run{count}", *flags)), log)
        files += folder.iterdir()
    one, two = files
    assert (one.name, one.read_bytes()) == (two.name, two.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--loss.center", "projected", "--loss.norm_form", "paper", "--loss.angle_form", "paper"],
        ["--loss.center", "residual", "--loss.norm_form", "released", "--loss.angle_form", "released"],
    ],
    ids=["paper", "released"],
)
def test_twenty_steps_of_two_and_three_processes_equal_one(
    arguments: Arguments, tmp_path: Path, flags: list[str]
) -> None:
    """One process with 12 images a step, 2 with 6, 3 with 4: the same parameters to 1e-6, the same losses; not so if
    each takes its negatives from its own images only."""
    log = tmp_path / "log"
    cache = ["--cache.folder", str(tmp_path / "cache")]

    def parameters(count: int, *more: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        run = tmp_path / f"{count}{len(more)}"
        size = ["--optim.steps", "20", "--optim.batch_size", str(12 // count)]
        argv = arguments(run, *BOTH_LOSSES, *flags, *cache, *size, *more)
        wait(start(count, log, pretrain_in_float64, argv), log)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return trained(run), torch.tensor([[line[key] for key in ("loss", "angle", "norm")] for line in lines])

    def furthest(found: dict[str, torch.Tensor]) -> float:
        return max(float((found[name] - value).abs().max()) for name, value in one.items())

    one, losses = parameters(1)
    assert {value.dtype for value in one.values()} == {torch.float64}
    for count in (2, 3):
        weights, found = parameters(count)
        assert furthest(weights) < 1e-6
        torch.testing.assert_close(found, losses, rtol=1e-9, atol=1e-9)
    assert furthest(parameters(2, "--loss.cross_process", "false")[0]) > 1e-4
