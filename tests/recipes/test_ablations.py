"""What a configuration may leave out or replace (ADPretrain Tab. 2a), and what a run says about its references."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from processes import together
from running import train
from safetensors.torch import load_file, save_file

from adpretrain import ADExtractor, load_backbone
from adpretrain.config import PretrainConfig, ProjectorConfig
from adpretrain.data import index_dataset
from adpretrain.hub.contents import files_to_publish
from adpretrain.parsing import parse_command_line
from adpretrain.projector import FeatureProjector
from adpretrain.training.dataset import PretrainingSet
from adpretrain.training.launch import start
from adpretrain.training.monitor import vitals
from adpretrain.training.run import prepare
from adpretrain.training.state import make_batches, set_up

Arguments = Callable[..., list[str]]
PLAIN = ["--local_scale", "null", "--augment", "epoch", "--cache.draws", "0", "--data.workers", "0"]
PLAIN += ["--backbone.image_size", "64", "--loss.lambda_", "1.0", "--optim.steps", "3", "--tokens", "0"]


@pytest.fixture
def plain(arguments: Arguments) -> Arguments:
    """Flags of three steps as the paper's: two views, both losses, no local scale and no cache."""
    return lambda run, *flags: arguments(run, *PLAIN, "--data.held_out", "[]", *flags)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def centers(run: Path) -> list[torch.Tensor]:
    weights = load_file(run / "extractor" / "model.safetensors")
    return [weights[name] for name in sorted(weights) if name.startswith("center_")]


def test_centres_are_those_of_all_normals_unaugmented(plain: Arguments, tiny_set: Path, tmp_path: Path) -> None:
    """However the images are dealt: one process or two, and as a loop over the normal images gives them."""
    train(tmp_path / "log", plain(tmp_path / "one"))
    train(tmp_path / "log2", plain(tmp_path / "two", "--optim.batch_size", "4"), count=2)
    backbone = load_backbone("lite0", image_size=64, levels=[1, 2, 3], finest=8)
    normal = [sample for sample in index_dataset("realiad", tiny_set) if not sample.anomalous]
    data = PretrainingSet(normal, backbone.preprocess, [3], 0, "none")
    extractor = ADExtractor(backbone)
    sums, count = [torch.zeros(width, dtype=torch.float64) for width in backbone.channels], 0
    for index in range(len(data)):
        pictures = torch.stack([data.pixels(other) for other in (index, *data.draw_references(index, 0))])
        image, references = data.preprocess.normalise(pictures).tensor_split([1])
        for total, level in zip(sums, extractor(image, extractor.encode_references(references)), strict=True):
            total += level.double().mean((0, 2, 3))
        count += 1
    for run in ("one", "two"):
        for found, total in zip(centers(tmp_path / run), sums, strict=True):
            torch.testing.assert_close(found.double(), total / count, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("flags", "gone"), [(["--loss.norm_weight", "0"], "norm"), (["--loss.lambda_", "0"], "angle")])
def test_one_loss_alone(plain: Arguments, tmp_path: Path, flags: list[str], gone: str) -> None:
    train(tmp_path / "log", plain(tmp_path / "run", *flags))
    kept = {"norm": "angle", "angle": "norm"}[gone]
    assert any(line[kept] for line in lines(tmp_path / "run"))
    for line in lines(tmp_path / "run"):
        assert line[gone] == 0
        weight = 0.5 if kept == "angle" else 1  # the anchors are half of the 2N tokens of Eq. 7
        assert line["loss"] == pytest.approx(weight * line[kept], rel=1e-5)


def test_features_without_references(plain: Arguments, tmp_path: Path) -> None:
    """Tab. 2a, 2.2: the projector learns on the backbone's own features, and needs no references afterwards."""
    train(tmp_path / "log", plain(tmp_path / "run", "--matching", "none"))
    extractor = ADExtractor.from_pretrained(tmp_path / "run" / "extractor")
    images = torch.rand(2, 3, 64, 64)
    assert extractor.projector is not None
    for found, expected in zip(extractor(images), extractor.projector(extractor.backbone(images)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("matching", ["l2", "none"])
def test_a_backbone_that_learns_itself(plain: Arguments, tmp_path: Path, matching: str) -> None:
    """Tab. 2a, 2.3 and 2.8: no projector; the trained weights lie beside the extractor, which refuses others. A run cut
    in two ends with the same bytes."""
    torch.manual_seed(0)
    weights = tmp_path / "random.safetensors"
    save_file(timm.create_model("resnet10t.c3_in1k").state_dict(), weights)
    flags = ["--backbone.name", "timm/resnet10t.c3_in1k", "--backbone.weights", str(weights), "--learns", "backbone"]
    flags += ["--matching", matching, "--optim.lr", "0.01", "--checkpoint_every", "1"]
    train(tmp_path / "log", plain(tmp_path / "run", *flags))
    learnt = load_file(tmp_path / "run" / "backbone.safetensors")
    before = load_file(weights)
    assert any(not torch.equal(value, before[name]) for name, value in learnt.items() if name in before)
    assert all(torch.isfinite(value).all() for value in learnt.values())
    folder = tmp_path / "run" / "extractor"
    extractor = ADExtractor.from_pretrained(folder, weights=tmp_path / "run" / "backbone.safetensors")
    assert extractor.projector is None
    assert all(torch.equal(value, learnt[name]) for name, value in extractor.backbone.network.state_dict().items())
    with pytest.raises(ValueError, match="made with other weights"):
        ADExtractor.from_pretrained(folder, weights=weights)
    with pytest.raises(ValueError, match="nobody could load what would be published"):
        files_to_publish(folder)
    (tmp_path / "cut").mkdir()
    for name in ("config.yaml", "checked.json"):
        (tmp_path / "cut" / name).write_bytes((tmp_path / "run" / name).read_bytes())
    (tmp_path / "cut" / "checkpoints").mkdir()
    step = "checkpoints/step_0000002.pt"
    (tmp_path / "cut" / step).write_bytes((tmp_path / "run" / step).read_bytes())
    assert "resuming" in train(tmp_path / "log", plain(tmp_path / "cut", *flags))
    resumed = (tmp_path / "cut" / "backbone.safetensors").read_bytes()
    assert resumed == (tmp_path / "run" / "backbone.safetensors").read_bytes()


def test_weights_in_bfloat16_as_the_released_run_has_them(plain: Arguments, tmp_path: Path) -> None:
    """Every number of the projector is one that bfloat16 has; the saved file holds them as float32."""
    train(tmp_path / "log", plain(tmp_path / "run", "--optim.precision", "bf16", "--optim.weights", "bfloat16"))
    weights = load_file(tmp_path / "run" / "extractor" / "model.safetensors")
    trained = {name: value for name, value in weights.items() if name.startswith("projector.")}
    assert trained
    for value in trained.values():
        assert value.dtype == torch.float32
        assert torch.equal(value, value.bfloat16().float())


def test_a_decay_of_float32_weights_is_warned_of(plain: Arguments, tmp_path: Path) -> None:
    said = train(tmp_path / "log", plain(tmp_path / "run", "--optim.weight_decay", "0.0005"))
    assert "optim.weight_decay 0.0005 on float32 weights erases the learnable references" in said
    assert "erases" not in train(tmp_path / "log", plain(tmp_path / "other"))


def test_residuals_far_longer_than_the_radius_are_warned_of_once(plain: Arguments, tmp_path: Path) -> None:
    """Lite0's are, without a local scale: e to their length is the paper's norm loss, which overflows."""
    flags = ["--loss.norm_form", "paper", "--loss.lambda_", "0"]
    said = train(tmp_path / "log", plain(tmp_path / "run", *flags), expected=1)
    assert said.count("where loss.radius is 0.4") == 1
    assert "set local_scale (--local_scale.share 0.35)" in said
    scaled = train(tmp_path / "log", plain(tmp_path / "scaled", *flags, "--local_scale.share", "0.35"))
    assert "loss.radius" not in scaled
    assert "loss.radius" not in train(tmp_path / "log", plain(tmp_path / "released"))


def test_metrics_tell_whether_the_references_live(plain: Arguments, tmp_path: Path) -> None:
    """They start with deviation 1; the output of the attention starts at 0 and begins to vary over tokens."""
    train(tmp_path / "log", plain(tmp_path / "run"))
    *_, last = lines(tmp_path / "run")
    for level in range(3):
        assert last[f"reference_std_{level}"] == pytest.approx(1, abs=0.1)
        assert last[f"attention_spread_{level}"] > 0


def test_vitals_against_their_definition_and_of_dead_references() -> None:
    torch.manual_seed(0)
    projector, residuals = FeatureProjector([8, 12], ProjectorConfig(references=16, heads=2, form="released")), []
    for level, width in zip(projector.levels, (8, 12), strict=True):
        residuals.append(torch.randn(2, width, 5, 5))
        with torch.no_grad():
            level.references.mul_(3)
    found = projector.vitals(residuals)
    for row, level, residual in zip(found, projector.levels, residuals, strict=True):
        x_NC = residual.flatten(2).mT.flatten(0, 1)
        with torch.no_grad():
            output = torch.stack([level.attention[0](x[None, None], level.keys_values()[0])[0, 0] for x in x_NC])
        expected = [
            level.references.std(),
            output.std(0, correction=0).square().mean().sqrt(),
            output.square().mean().sqrt(),
        ]
        assert row.tolist() == pytest.approx([value.item() for value in expected], rel=1e-4)
    with torch.no_grad():
        for level in projector.levels:
            level.references.zero_()  # all values are equal then: whatever is asked, the answer is the same
    _, spread, size = projector.vitals(residuals).unbind(1)
    assert (spread < 1e-6 * size).all()


def warned(rank: int, argv: list[str]) -> list[str]:
    """What a run says of references that a huge decay has erased."""
    from rich.console import Console

    console = Console(record=True, width=500)
    config = parse_command_line(PretrainConfig, argv)
    run = set_up(config, console, start(config))
    batch = prepare(run, next(iter(make_batches(run)(run.schedule(0, 1)))))
    layers = run.extractor.projector.levels
    vitals(run, batch)  # outputs of zero, at the start: nothing has died
    for level in layers:
        torch.nn.init.normal_(level.attention[0].out.weight)
        level.references.data.mul_(100)  # keys far apart, whatever the residuals' scale
    vitals(run, batch)  # alive
    with torch.no_grad():
        layers[0].references.fill_(0.5)  # erased
        for level in layers[1:]:  # alive, but nothing is asked of them any more
            level.attention[0].query.weight.zero_()
    assert not console.export_text(clear=False).count("constant")
    vitals(run, batch)
    vitals(run, batch)
    return console.export_text().splitlines()


@pytest.mark.parametrize("decay", [True, False])
def test_a_run_whose_references_have_died_says_so_once_a_level(plain: Arguments, tmp_path: Path, decay: bool) -> None:
    flags = ["--optim.weight_decay", "0.0005"] if decay else []
    (said,) = together(1, tmp_path, warned, plain(tmp_path / "run", *flags))
    found = [line for line in said if "has become a constant" in line]
    assert len(found) == 3
    assert all(("lower optim.weight_decay" in line) == decay for line in found)


def test_a_loss_that_is_not_finite_names_its_step_however_late_it_is_read(plain: Arguments, tmp_path: Path) -> None:
    """Losses are read where a line is logged or something is saved; nothing of the steps after it is kept."""
    flags = ["--optim.lr", "1e30", "--optim.steps", "12", "--log_every", "6", "--checkpoint_every", "100"]
    said = train(tmp_path / "log", plain(tmp_path / "run", *flags), expected=1)
    assert "training failed: step 2: level 0" in said
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
