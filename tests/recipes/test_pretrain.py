"""The pretraining command: learns, resumes to the same bytes, refuses what it should."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from running import LAUNCH, ROOT, train

from adpretrain import ADExtractor, load_backbone
from adpretrain.data import ImageDataset, index_dataset

Arguments = Callable[..., list[str]]


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(arguments: Arguments, tmp_path: Path) -> None:
    """Ctrl-C as a terminal sends it, to `accelerate launch` and the training below it at once."""
    flags = ("--optim.steps", "40", "--checkpoint_every", "5", "--backbone.image_size", "64")
    log, argv = tmp_path / "log", arguments(tmp_path / "cut", *flags)
    train(log, arguments(tmp_path / "whole", *flags))
    process = subprocess.Popen(
        [*LAUNCH, "recipes/pretrain.py", *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while not list((tmp_path / "cut" / "checkpoints").glob("step_*.pt")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=300)[0]
    assert "the same command resumes" in output
    assert not (tmp_path / "cut" / "extractor").exists()
    assert "resuming" in train(log, argv)
    weights = [(tmp_path / name / "extractor" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    losses = [[line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("whole", "cut")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 40


@pytest.mark.slow
def test_run_folder_holds_what_the_readme_says_and_the_extractor_knows_its_origin(
    arguments: Arguments, tmp_path: Path
) -> None:
    log, run = tmp_path / "log", tmp_path / "run"
    flags = ["--backbone.image_size", "64", "--eval.every", "3", "--tracker", "true"]
    said = train(log, arguments(run, *flags, "--optim.steps", "6"))
    assert "held-out image AUROC" in said
    for name in ("config.yaml", "metrics.jsonl", "curves.png", "tensorboard", "extractor/config.json"):
        assert (run / name).exists(), name
    assert len(list((run / "heatmaps").glob("p000*/*.png"))) == 1  # one held-out product, one kind of its defects
    provenance = ADExtractor.from_pretrained(run / "extractor").config.provenance
    assert provenance["steps"] == 6
    assert provenance["data"]["categories"] == 5  # of six, p000 is held out
    assert (provenance["data"]["layout"], provenance["data"]["licence"]) == ("drawn", None)
    scored = {line["step"]: (line["image_auroc"] + line["aupro"]) / 2 for line in lines(run) if "image_auroc" in line}
    assert provenance["kept_step"] == max(scored, key=lambda step: scored[step])  # eval.keep is "best" in this config
    assert provenance["held_out_metrics"]["step"] == provenance["kept_step"]
    first = next(line for line in lines(run) if "image_auroc" in line)
    # Before training the projector returns its input: the same features, hence the same scores.
    assert first["image_auroc"] == pytest.approx(first["raw_image_auroc"], abs=1e-9)
    other = train(log, arguments(run, *flags, "--optim.steps", "7"), expected=2)
    assert "optim.steps was 6, now 7" in other
    train(log, arguments(run, *flags, "--optim.steps", "6", "--data.licence", "own"))  # may be said afterwards
    assert ADExtractor.from_pretrained(run / "extractor").config.provenance["data"]["licence"] == "own"


@pytest.mark.slow
def test_both_losses_online_with_new_views_every_epoch(arguments: Arguments, tmp_path: Path) -> None:
    flags = ["--augment", "epoch", "--cache.draws", "0", "--loss.lambda_", "1.0", "--tokens", "0"]
    flags += ["--data.workers", "1", "--data.held_out", "[]", "--optim.steps", "3", "--optim.precision", "bf16"]
    train(tmp_path / "log", arguments(tmp_path / "run", *flags))
    logged = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert all(line["angle"] != 0 and line["norm"] > 0 for line in logged)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.held_out", '["screw"]'], "held-out category 'screw' matches none of"),
        (["--shots", "[8]"], "K = 8 references need 9 normal images"),
        (["--eval.shots", "70"], "/C1: 70 references (shots) cannot be drawn from its pool of 6 normal images"),
        (["--backbone.name", "resnet"], "backbone 'resnet' is unknown; choose one of"),
        (["--data.root", "nowhere"], "not found: nowhere"),
        (["--optim.batch_size", "4000"], "exceeds"),
        (["--optim.lrr", "1"], "--optim.lrr"),
        (["--run", "/dev/null/run"], "/dev/null/run"),
    ],
)
def test_mistakes_are_named_in_a_sentence(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    refusal: Callable[[list[str]], str],
    flags: list[str],
    words: str,
) -> None:
    assert words in refusal(arguments(tmp_path / "run", *flags))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_held_out_masks_that_the_network_does_not_see_are_refused_before_training(
    tiny_set: Path, arguments: Callable[..., list[str]], tmp_path: Path, refusal: Callable[[list[str]], str]
) -> None:
    """One marked pixel in the corner is lost when the mask gets the network's size: AUPRO would be nan."""
    root = shutil.copytree(tiny_set, tmp_path / "set")
    held_out = [s for s in index_dataset("realiad", root) if s.category.startswith("p000") and s.anomalous]
    for sample in held_out:
        for file in sample.mask_files:
            Image.new("L", Image.open(file).size).save(file)
        with Image.open(sample.mask_files[0]) as mask:
            mask.putpixel((0, 0), 255)
            mask.save(sample.mask_files[0])
    preprocess = load_backbone("lite0", image_size=64).preprocess
    assert not any(ImageDataset(held_out, preprocess)[i]["mask"].any() for i in range(len(held_out)))
    quick = ["--data.root", str(root), "--backbone.image_size", "64", "--local_scale", "null", "--optim.steps", "1"]
    said = refusal(arguments(tmp_path / "run", *quick, "--eval.shots", "2"))
    assert "no held-out product has a marked pixel where the network looks" in said
