"""The whole pretraining command on a device that is not the CPU, held-out products and checkpoints included."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from devices import Device
from products import make_synthetic
from running import ROOT
from safetensors.torch import load_file


def forget() -> None:
    """What accelerate remembers of the process, its device included."""
    for state in (PartialState, AcceleratorState, GradientState):
        state._reset_state()


@pytest.fixture(autouse=True)
def the_next_test_finds_its_own_device() -> Iterator[None]:
    yield
    forget()


def run(folder: Path, data: Path, *more: str) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Two steps; the lines it logged and the extractor's tensors."""
    import pretrain

    forget()
    flags = ["--config", str(ROOT / "recipes/configs/demo.yaml"), "--run", str(folder), "--data.root", str(data)]
    flags += ["--cache.folder", "", "--shots", "[1]", "--optim.batch_size", "4", "--projector.references", "8"]
    flags += ["--tracker", "false", "--log_every", "1", "--optim.steps", "2", "--backbone.image_size", "64"]
    flags += ["--eval.keep", "last", "--eval.shots", "1", "--tokens", "16", "--cache.threads", "1"]
    assert pretrain.main([*flags, *more]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, load_file(next(folder.rglob("model.safetensors")))


@pytest.mark.slow
def test_pretraining_ends_with_the_cpu_s_weights(device: Device, tmp_path: Path) -> None:
    data = make_synthetic(tmp_path / "set", 3, 4, 2, size=64, seed=3, workers=1, progress=False)
    with mock.patch.object(PartialState, "default_device", torch.device("cpu")):
        lines, weights = run(tmp_path / "cpu", data)
    with mock.patch.object(PartialState, "default_device", device.place):
        found_lines, found = run(tmp_path / "device", data)
    trained = [line["loss"] for line in lines if "loss" in line]
    assert [line["loss"] for line in found_lines if "loss" in line] == pytest.approx(trained, rel=1e-3)
    assert len(trained) == 2
    assert trained[0] != trained[1]
    if device.pretended:
        for name, value in weights.items():
            torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_deterministic_runs_agree_to_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU where there is one; of the pretended device torch's own deterministic forms know nothing."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    data = make_synthetic(tmp_path / "set", 3, 4, 2, size=64, seed=3, workers=1, progress=False)
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with mock.patch.object(PartialState, "default_device", place):
        try:
            _, first = run(tmp_path / "first", data, "--deterministic", "true")
            asked = torch.are_deterministic_algorithms_enabled(), os.environ["CUBLAS_WORKSPACE_CONFIG"]
            _, second = run(tmp_path / "second", data, "--deterministic", "true")
        finally:
            torch.use_deterministic_algorithms(False)
    assert asked == (True, ":4096:8")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["paper", "released"])
def test_a_step_waits_for_nothing_and_launches_no_more_for_more_images(
    device: Device, tmp_path: Path, family: str
) -> None:
    """From the loaded photographs to the updated weights, as both families of configurations train. Matching takes a
    few operations for each level and each of the three numbers of references, however many images there are."""
    if device.syncs is None or device.launches is None:
        pytest.skip("a GPU does not count")
    from rich.console import Console

    from adpretrain.config import PretrainConfig
    from adpretrain.parsing import parse_command_line
    from adpretrain.training.launch import start
    from adpretrain.training.run import advance
    from adpretrain.training.state import make_batches, set_up

    data = make_synthetic(tmp_path / "set", 1, 30, 10, size=64, seed=3, workers=1, progress=False)
    launches = {}
    with mock.patch.object(PartialState, "default_device", device.place):
        for size in (6, 24):
            forget()
            path = "dinov2-base.yaml" if family == "paper" else "released/dinov2-base.yaml"
            flags = ["--config", str(ROOT / "recipes/configs" / path), "--run", str(tmp_path / str(size))]
            flags += [
                "--data.root",
                str(data),
                "--backbone.name",
                "lite0",
                "--backbone.image_size",
                "64",
                "--backbone.resize",
                "squeeze",
            ]
            flags += [
                "--backbone.crop_from",
                "null",
                "--projector.references",
                "8",
                "--optim.batch_size",
                str(size),
                "--data.workers",
                "0",
            ]
            flags += [
                "--tracker",
                "false",
                "--optim.precision",
                "no",
                "--optim.weights",
                "float32",
                "--shots",
                "[1,4,8]",
            ]
            config = parse_command_line(PretrainConfig, flags)
            run = set_up(config, Console(quiet=True), start(config))
            run.model.train()
            marks: list[tuple[str, int]] = []
            run.speed.watch = lambda phase, marks=marks: marks.append((phase, device.launches.total()))
            source = iter(make_batches(run)(run.schedule(0, 2)))
            advance(run, next(source), first=True)  # Adam's state is made
            before = device.syncs.copy()
            marks.clear()
            _, losses = advance(run, next(source), first=False)
            assert device.syncs == before
            assert losses.values()[0] > 0
            starts = dict(reversed(marks))
            launches[size] = starts["loss"] - starts["matching"]
    levels, numbers = len(run.extractor.channels), len(config.shots)
    assert launches[24] <= 35 * levels * numbers
    assert (
        launches[24] <= numbers * launches[6]
    )  # six images may lack a number of references, four times as many do not
