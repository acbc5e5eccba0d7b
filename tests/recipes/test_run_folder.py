"""The folder of a run: damaged checkpoints are noticed wherever the damage is, and what is written later stays."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from adpretrain.config import PretrainConfig

STATE = {"extractor": {"weight": torch.arange(2000.0)}, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}}


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    from adpretrain.training.run_folder import RunFolder

    return RunFolder(PretrainConfig(run=str(tmp_path)), Console(width=1000), main=True)


def cut(whole: bytes, rng: random.Random) -> bytes:
    return whole[: rng.randrange(len(whole))]


def hole(whole: bytes, rng: random.Random) -> bytes:
    """What was not yet written when the machine was lost reads as zeros."""
    start = rng.randrange(len(whole))
    length = rng.randrange(1, len(whole) - start + 1)
    return whole[:start] + bytes(length) + whole[start + length :]


def flipped(whole: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(whole))
    return whole[:place] + bytes([whole[place] ^ rng.randrange(1, 256)]) + whole[place + 1 :]


@pytest.mark.parametrize(
    "damage", [cut, hole, flipped, lambda whole, rng: rng.randbytes(300)], ids=["cut", "hole", "flipped", "noise"]
)
def test_a_damaged_checkpoint_is_never_taken_for_another(
    folder: Any, damage: Callable[[bytes, random.Random], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """200 damages: the one before is loaded, loudly, or what was saved, where the damage is in no content."""
    rng = random.Random(0)
    for step in (1, 2):
        folder.save_checkpoint(step, STATE)
    newest = folder.checkpoints()[0]
    whole = newest.read_bytes()
    noticed = 0
    for _ in range(200):
        newest.write_bytes(damage(whole, rng))
        state = folder.load_checkpoint()
        said = capsys.readouterr().out
        assert torch.equal(state["extractor"]["weight"], STATE["extractor"]["weight"])
        assert ("step_0000002.pt is unreadable" in said) == (state["step"] == 1)
        noticed += state["step"] == 1
    assert noticed > 150


def test_what_is_saved_after_falling_back_stays(folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (8, 9):
        folder.save_checkpoint(step, STATE)
    for path in folder.checkpoints():
        path.write_bytes(b"")
    assert folder.load_checkpoint() is None
    assert "no checkpoint is readable: training starts again at step 0" in capsys.readouterr().out
    for step in (1, 2, 3):
        folder.save_checkpoint(step, STATE)
        assert folder.load_checkpoint()["step"] == step


@pytest.mark.slow
def test_other_images_and_checkpoints_of_other_versions_are_not_mixed_in(
    arguments: Callable[..., list[str]], tiny_set: Path, tmp_path: Path, refusal: Callable[[list[str]], str]
) -> None:
    from pretrain import main

    run, moved = tmp_path / "run", tmp_path / "moved"
    argv = arguments(run, "--optim.steps", "1", "--backbone.image_size", "64", "--local_scale", "null")
    argv += ["--cache.folder", str(tmp_path), "--data.held_out", "[]"]
    assert main(argv) == 0
    shutil.copytree(tiny_set, moved)
    argv += ["--data.root", str(moved)]
    assert main(argv) == 0  # the same images elsewhere
    spare = sorted(moved.rglob("p001*_OK_*.jpg"))[0]
    spare.unlink()
    assert f"was trained on other images than those of {moved}" in refusal(argv)
    shutil.copy2(tiny_set / spare.relative_to(moved), spare)
    (newest,) = (run / "checkpoints").iterdir()
    whole = torch.load(newest)
    name = next(iter(whole["extractor"]))
    odd = ({f"old_{name}": 0, **whole["extractor"]}, {**whole["extractor"], name: torch.zeros(7, 7)})
    for change in ({"data": None}, *({"extractor": weights} for weights in odd)):
        changed = {key: value for key, value in {**whole, **change}.items() if value is not None}
        torch.save(changed, newest)
        assert "were written by another version" in refusal(argv)


@pytest.mark.slow
def test_a_run_stopped_before_its_first_checkpoint_scores_the_untrained_projector_once(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    from pretrain import main

    run = tmp_path / "run"
    argv = arguments(run, "--optim.steps", "1", "--backbone.image_size", "64", "--local_scale", "null")
    argv += ["--cache.folder", str(tmp_path)]
    for _ in range(2):
        assert main(argv) == 0
        os.unlink(run / "checkpoints" / "step_0000001.pt")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "loss" in line) for line in lines] == [(0, False), (1, True), (1, False)]


def test_a_run_begun_before_a_key_existed_goes_on_with_its_default(folder: Any, tmp_path: Path) -> None:
    written = tmp_path / "config.yaml"
    written.write_text(written.read_text().replace("deterministic: false\n", ""))
    type(folder)(PretrainConfig(run=str(tmp_path)), Console(), main=True)
    with pytest.raises(ValueError, match=r"deterministic was False, now True.*choose another --run"):
        type(folder)(PretrainConfig(run=str(tmp_path), deterministic=True), Console(), main=True)
