"""The whole pretraining command on a device that is not the CPU, held-out products and checkpoints included."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from devices import Device
from running import ROOT
from safetensors.torch import load_file

from adpretrain.data.synthetic import make_synthetic


def run(folder: Path, data: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Two steps; the lines it logged and the extractor's tensors."""
    import pretrain

    for state in (PartialState, AcceleratorState, GradientState):
        state._reset_state()
    flags = ["--config", str(ROOT / "recipes/configs/demo.yaml"), "--run", str(folder), "--data.root", str(data)]
    flags += ["--cache.folder", "", "--shots", "[1]", "--optim.batch_size", "4", "--projector.references", "8"]
    flags += ["--tracker", "false", "--log_every", "1", "--optim.steps", "2", "--backbone.image_size", "64"]
    flags += ["--eval.keep", "last", "--eval.shots", "1", "--tokens", "16", "--cache.threads", "1"]
    assert pretrain.main(flags) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, load_file(next(folder.rglob("model.safetensors")))


@pytest.mark.slow
def test_pretraining_ends_with_the_cpu_s_weights(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
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
