"""RD4AD and ReContrast: which weights learn from what in every configuration, and that a defect is found.

Table 6 of Guo et al. 2023 names the configurations, Table A5 gives the parameters.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from drawn import photographs, tile
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adpretrain.backbones import Backbone, load_backbone
from adpretrain.extractor import ADExtractor
from downstream.cli import main
from downstream.detectors import DETECTORS, build_detector, detector_from_pretrained
from downstream.detectors.rd4ad import DEFAULT as RD4AD_DEFAULT
from downstream.detectors.rd4ad import RD4AD
from downstream.detectors.recontrast import DEFAULT, ReContrast, ReContrastConfig
from downstream.detectors.recontrast.encoder import LEAST_VARIANCE, GuardedNorm, trainable_copy
from downstream.detectors.recontrast.forms import FORMS
from downstream.detectors.recontrast.network import Reversed
from downstream.detectors.recontrast.training import Contrast, alpha_at
from downstream.inspection.fitting import fit_folder
from downstream.learning import Workplace
from downstream.lessons import LearningConfig

SIDE = 64
CHANNELS = [8, 12, 16]
STEPS = LearningConfig(steps=3, batch_size=4)
TRAINED = [name for name, form in FORMS.items() if form.trains]


NETWORK = "mnasnet_small"  # small, and its batch norms have their activation inside


def random(name: str = NETWORK, levels: list[int] | None = None) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load_backbone(f"timm/{name}", pretrained=False, image_size=SIDE, levels=levels or [1, 2, 3])


def levels(seed: int, grad: bool = False) -> list[Tensor]:
    """Three levels of CHANNELS, as features of four images."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(4, c, 16 >> i, 16 >> i, generator=generator) for i, c in enumerate(CHANNELS)]
    return [level.requires_grad_(grad) for level in made]


def contrast(form: Any, hard_mining: bool = False) -> Contrast:
    """The learner on CHANNELS, in evaluation mode; its encoder's features are given to it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = Reversed(CHANNELS, 2 if FORMS[form].crosses else 1)
    return Contrast(network, None, ReContrastConfig(None, form, hard_mining)).eval()


# The network


@pytest.mark.parametrize(
    ("name", "divisor", "rd4ad", "ours"),
    [("resnet18", None, 18.7, 21.7), ("resnet50", 4, 63.6, 74.9), ("wide_resnet50_2", None, 117, 145)],
)
def test_as_many_parameters_as_in_the_paper(name: str, divisor: int | None, rd4ad: float, ours: float) -> None:
    """Table A5, in millions. The released bottleneck also holds a convolution that it never uses."""
    with torch.device("meta"):
        encoder: Any = timm.create_model(name, features_only=True, out_indices=[1, 2, 3])
        channels = encoder.feature_info.channels()
        one, two = (Reversed(channels, views, divisor) for views in (1, 2))

    def millions(module: nn.Module) -> float:
        return sum(weight.numel() for weight in module.parameters()) / 1e6

    unused = 4 * channels[-1] * 2 * channels[-1] / 1e6
    projections = millions(one.heads)  # RD4AD has none
    assert millions(encoder) + millions(one) - projections + unused == pytest.approx(rd4ad, abs=0.5 + 1e-3 * rd4ad)
    assert millions(encoder) + millions(one) - projections + unused == pytest.approx(rd4ad, rel=5e-3)
    assert 2 * millions(encoder) + millions(two) + unused == pytest.approx(ours, rel=5e-3)


@pytest.mark.parametrize("channels", [[5], [24, 40], [24, 40, 112], [4, 4, 6, 8]])
def test_any_pyramid_is_reconstructed_in_its_own_shape(channels: list[int]) -> None:
    network = Reversed(channels, 2).eval()
    given = [torch.randn(3, c, 32 >> i, 32 >> i) for i, c in enumerate(channels)]
    code = network.bottleneck(given)
    assert code.shape == (3, 2 * channels[-1], 32 >> len(channels), 32 >> len(channels))
    for view in network([given, given]):
        assert [found.shape for found in view] == [level.shape for level in given]


def test_every_level_reaches_every_reconstruction() -> None:
    """The code is the only way: each of the levels influences it, and nothing else the decoder."""
    network, given = Reversed(CHANNELS, 1).eval(), levels(0, grad=True)
    for found in network([given])[0]:
        gradients = torch.autograd.grad(found.square().sum(), given, retain_graph=True)
        assert all(float(gradient.abs().sum()) > 0 for gradient in gradients)
    code = network.bottleneck(given)
    torch.testing.assert_close(network.decoder[0](code), network.decode(given)[-1])


# The configurations


@pytest.mark.parametrize("form", FORMS)
def test_what_a_configuration_reconstructs_and_from_what(form: str) -> None:
    model, frozen, trained = contrast(form), levels(0, grad=True), levels(1, grad=True)
    one_encoder = not FORMS[form].trains
    pairs = model.pairs(frozen if one_encoder else [*frozen, *trained], None)
    expected = [*frozen, *trained] if FORMS[form].crosses else frozen if one_encoder else trained
    assert len(pairs) == len(expected)
    assert all(target is level for (target, _), level in zip(pairs, expected, strict=True))
    for number, (_, found) in enumerate(pairs):
        gradients = torch.autograd.grad(found.square().sum(), [frozen[0], trained[0]], None, True, allow_unused=True)
        sees_frozen, sees_trained = (g is not None and float(g.abs().sum()) > 0 for g in gradients)
        from_trained = FORMS[form].trains if not FORMS[form].crosses else number < 3  # the other one's features
        assert (sees_frozen, sees_trained) == (not from_trained, from_trained)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_stops_at_what_is_reconstructed(form: str) -> None:
    """Eq. 4 in D and E; without it, in C and C+cp, the target is drawn to its reconstruction."""
    pairs = list(zip(levels(0, grad=True), levels(1, grad=True), strict=True))
    loss = contrast(form).loss(pairs, None, 0.5)
    targets = torch.autograd.grad(loss, [target for target, _ in pairs], allow_unused=True, retain_graph=True)
    assert all((gradient is None) == FORMS[form].stops for gradient in targets)
    found = torch.autograd.grad(loss, [found for _, found in pairs])
    assert all(float(gradient.abs().sum()) > 0 for gradient in found)


def test_only_the_regional_loss_takes_places_one_by_one() -> None:
    """Scaling one place of a reconstruction changes no angle there, but that of the whole level."""
    pairs = list(zip(levels(0), levels(1), strict=True))
    longer = [(target, found * (1 + 4 * torch.eye(found.shape[2]))) for target, found in pairs]
    for form in FORMS:
        before, after = (float(contrast(form).loss(these, None, 0.5)) for these in (pairs, longer))
        assert (abs(after - before) < 1e-5) == (form == "A")


def test_hard_mining_discards_the_gradients_of_easy_places_only() -> None:
    pairs = [(target, target + 0.5 * away) for target, away in zip(levels(0), levels(1), strict=True)]
    pairs = [(target, found.requires_grad_()) for target, found in pairs]
    plain, mined = (contrast("E", hard).loss(pairs, None, 1.0) for hard in (False, True))
    assert torch.equal(plain, mined)
    every, some = (torch.autograd.grad(loss, [found for _, found in pairs]) for loss in (plain, mined))
    for (target, found), before, after in zip(pairs, every, some, strict=True):
        a, b = target.double(), found.detach().double()
        distance = 1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
        easy = (distance < distance.mean() + distance.std())[:, None]
        assert 0.7 < float(easy.double().mean()) < 0.95  # 84 % of a Gaussian, App. D.3
        assert torch.equal(after, before.masked_fill(easy, 0))


def test_alpha_rises_in_the_first_tenth_of_the_steps() -> None:
    assert [alpha_at(done) for done in (0.0, 0.1, 0.5, 1.0)] == pytest.approx([-3, 1, 1, 1])
    assert [alpha_at(done, 2.0) for done in (0.025, 0.05)] == pytest.approx([-1.75, -0.5])


# The encoder


@pytest.mark.parametrize("form", TRAINED)
def test_the_copy_learns_and_the_backbone_does_not(form: Any) -> None:
    backbone = random()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    config = ReContrastConfig(form=form, training=STEPS, encoder_rate=1e-3)
    detector = ReContrast(backbone, config).fit([photographs(6, 0)])
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert not any(weight.requires_grad for weight in backbone.parameters())
    encoder = detector.model.encoder
    assert encoder is not None
    used = [name for name, weight in trainable_copy(backbone, None, False).named_parameters() if weight.requires_grad]
    assert len(used) > 100
    for name, weight in encoder.named_parameters():
        moved = float((weight - before[name]).abs().max())
        assert 0 < moved < 3.1e-3 if name in used else moved == 0  # a step of Adam moves it by at most its rate
    assert not any(module.training for module in detector.model.modules())


def test_predictions_use_the_trained_weights_as_timm_does() -> None:
    detector = ReContrast(random(), ReContrastConfig(training=STEPS, encoder_rate=1e-3)).fit([photographs(6, 0)])
    assert detector.model.encoder is not None
    network: Any = timm.create_model(NETWORK, features_only=True, out_indices=[1, 2, 3]).eval()
    state = detector.model.encoder.state_dict()
    network.load_state_dict({name.removeprefix("network."): value for name, value in state.items()})
    images = photographs(2, 1)
    with torch.no_grad():
        frozen = detector.extract(images)
        seen = detector.seen(images, frozen)
        expected = [*frozen, *network(images)]
    assert len(seen) == 6
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    maps = detector.from_features(expected).maps
    torch.testing.assert_close(detector.predict(images).maps, maps, rtol=1e-3, atol=1e-5)


def test_batch_norms_keep_or_follow_the_statistics() -> None:
    for mode in ("train", "eval", "guarded"):
        backbone = random()
        config = ReContrastConfig(batch_norm=mode, training=STEPS)  # type: ignore[arg-type]
        encoder = ReContrast(backbone, config).fit([photographs(6, 0)]).model.encoder
        assert encoder is not None
        norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
        before = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
        assert len(norms) == len(before) > 20
        same = [torch.equal(a.running_mean, b.running_mean) for a, b in zip(norms, before, strict=True)]  # type: ignore[arg-type]
        assert all(same) if mode == "eval" else not any(same)


def test_a_guarded_encoder_is_saved_whole(tmp_path: Path) -> None:
    """Weights, and the statistics that its batch norms have collected."""
    backbone, images = random(), photographs(2, 1)
    config = ReContrastConfig(batch_norm="guarded", training=STEPS)
    detector = ReContrast(backbone, config).fit([photographs(6, 0)])
    folder = detector.save_pretrained(tmp_path / "saved")
    expected = detector.predict(images)
    loaded = ReContrast.from_pretrained(folder, random())
    assert loaded.model.encoder is not None
    assert detector.model.encoder is not None
    found = loaded.model.encoder.state_dict()
    for name, value in detector.model.encoder.state_dict().items():
        assert torch.equal(found[name], value)
    assert torch.equal(loaded.predict(images).maps, expected.maps)
    with pytest.raises(ValueError, match="do not fit together"):
        ReContrast.from_pretrained(shortened(folder), random())


def shortened(folder: Path) -> Path:
    """The saved detector without one weight of its encoder."""
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    name = next(name for name in weights if name.startswith("encoder.") and name.endswith(".weight"))
    del weights[name], config["tensors"][name]
    save_file({name: value.clone() for name, value in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_guarded_norm_replaces_only_vanishing_variances() -> None:
    """App. E, against numpy: channels that vary, that hardly vary, and that hardly varied in pretraining, too."""
    norm = nn.BatchNorm2d(3, momentum=0.1)
    norm.running_mean, norm.running_var = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.5, 1e-7])
    norm.weight.data, norm.bias.data = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 0.1, 0.2])
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([1.0, 1e-2, 1e-3])[:, None, None]
    a = x.double().numpy()
    mean, variance = a.mean((0, 2, 3)), a.var((0, 2, 3))
    assert variance[1] < LEAST_VARIANCE
    assert 1e-7 < variance[2] < LEAST_VARIANCE  # larger than that of pretraining: not replaced
    used = np.array([variance[0], 0.5, variance[2]])
    kept = np.array([0.5, 0.5, 1e-7])
    expected = (a - mean[:, None, None]) / np.sqrt(used + norm.eps)[:, None, None]
    expected = expected * norm.weight.detach().numpy()[:, None, None] + norm.bias.detach().numpy()[:, None, None]
    unbiased = np.array([variance[0] * 100 / 99, 0.5, variance[2] * 100 / 99])
    guarded = GuardedNorm(norm).train()
    np.testing.assert_allclose(guarded(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.running_var.numpy(), 0.9 * kept + 0.1 * unbiased, rtol=1e-5)
    np.testing.assert_allclose(norm.running_mean.numpy(), 0.9 * np.array([0.1, 0.2, 0.3]) + 0.1 * mean, rtol=1e-5)
    assert torch.equal(guarded.eval()(x), norm.eval()(x))
    plain = nn.BatchNorm2d(3).train()
    varied = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(GuardedNorm(nn.BatchNorm2d(3)).train()(varied), plain(varied), rtol=1e-5, atol=1e-5)


def test_stages_that_are_not_used_are_not_trained() -> None:
    """Several processes could not reduce gradients that do not exist."""
    backbone = random("resnet18", [1, 2, 3, 4])
    detector = ReContrast(backbone)
    assert detector.config.levels == [0, 1, 2]
    copied = trainable_copy(backbone, detector.config.levels, guarded=False)
    trains = {name.split(".")[1] for name, weight in copied.named_parameters() if weight.requires_grad}
    assert trains == {"conv1", "bn1", "layer1", "layer2", "layer3"}
    small = ReContrast(random(levels=[1, 2, 3, 4]), ReContrastConfig(training=STEPS)).fit([photographs(4, 0)])
    assert len(small.seen(photographs(1, 1), [])) == 4
    assert len(small.predict(photographs(1, 1)).scores) == 1


def test_learning_rates_and_defaults_are_those_of_the_paper() -> None:
    config = ReContrastConfig()
    assert (config.form, config.hard_mining, config.alpha, config.batch_norm) == ("E", True, 1.0, "train")
    assert (config.training.steps, config.training.batch_size) == (2000, 16)
    assert (RD4AD_DEFAULT.form, RD4AD_DEFAULT.hard_mining) == ("B", False)
    encoder = trainable_copy(random(), None, guarded=False)
    optimizer = Contrast(Reversed(CHANNELS, 2), encoder, config).optimizer()
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, 1e-5]
    assert all(group["betas"] == (0.9, 0.999) and group["weight_decay"] == 1e-5 for group in optimizer.param_groups)
    assert len(optimizer.param_groups[1]["params"]) == sum(weight.requires_grad for weight in encoder.parameters())


# The detectors


def tiles(count: int, seed: int, blob: bool = False) -> Tensor:
    """Photographs of tiles, prepared for Lite0."""
    preprocess = load_backbone("lite0", image_size=SIDE).preprocess
    return torch.stack([preprocess(tile(seed + i, blob)) for i in range(count)])


@pytest.mark.parametrize("name", ["rd4ad", "recontrast"])
def test_a_defect_scores_above_all_that_is_good(name: str) -> None:
    backbone = load_backbone("lite0", image_size=SIDE, levels=[1, 2])
    options = {"training": {"steps": 25, "batch_size": 4}, "sigma": 2.0}
    detector: Any = build_detector(name, backbone, options).fit(tiles(6, 0).split(3))
    assert detector.losses[-1] < 0.65 * detector.losses[0]
    good, bad = detector.predict(tiles(6, 50)), detector.predict(tiles(6, 50, blob=True))
    assert float(bad.scores.min()) > float(good.scores.max())
    assert good.maps.shape == (6, SIDE, SIDE)
    detector.config = dataclasses.replace(detector.config, top=1.0)  # for data of one class against others
    torch.testing.assert_close(detector.predict(tiles(6, 50)).scores, good.maps.mean((1, 2)), rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rd4ad", "recontrast", "dinomaly"])
def test_an_interrupted_command_goes_on_to_the_same_bytes(name: str, write_tiles: Any, tmp_path: Path) -> None:
    normal = write_tiles("normal", range(5))
    chosen = [2] if name == "dinomaly" else [1, 2]
    settings = {"training": {"steps": 5, "batch_size": 3}}
    command = ["fit", "--detector", name, "--normal", str(normal), "--backbone", "lite0", "--image-size", str(SIDE)]
    command += ["--levels", str(chosen), "--set", "training.steps=5", "training.batch_size=3", "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0

    def interrupt(what: str, done: int, total: int) -> None:
        if (what, done) == (f"training {name}", 4):
            raise KeyboardInterrupt

    out = tmp_path / "resumed"
    place = Workplace(checkpoint=out.with_name("resumed.training.pt"), save_every=2)
    backbone = load_backbone("lite0", image_size=SIDE, levels=chosen)
    with pytest.raises(KeyboardInterrupt):
        fit_folder(name, backbone, normal, out, settings, progress=interrupt, workplace=place)
    assert not out.exists()
    checkpoint = out.with_name("resumed.training.pt")
    assert len(torch.load(checkpoint, weights_only=True)["losses"]) == 2
    assert main([*command, "--out", str(out), "--resume"]) == 0
    assert not checkpoint.exists()
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_rd4ad_takes_any_features_and_recontrast_a_backbone(tmp_path: Path) -> None:
    backbone = load_backbone("lite0", image_size=SIDE, levels=[1, 2, 3])
    extractor = ADExtractor(backbone).set_references(photographs(2, 5))
    config = ReContrastConfig(form="A", hard_mining=True, training=STEPS)
    for extract in (extractor, lambda images: backbone(images)[1:]):
        detector = RD4AD(extract, config).fit([photographs(4, 0)])
        assert detector.predict(photographs(2, 1)).maps.shape == (2, SIDE, SIDE)
    loaded = detector_from_pretrained(RD4AD(extractor, config).fit([photographs(4, 0)]).save_pretrained(tmp_path / "a"))
    assert isinstance(loaded, RD4AD)
    for given in (extractor, lambda images: [images]):
        with pytest.raises(ValueError, match=r"form 'E' trains a copy of the encoder and takes a raw Backbone, got a"):
            ReContrast(given)
    assert DETECTORS["recontrast"].options() is DETECTORS["rd4ad"].options()


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r'trains an encoder: choose "A" or "B", or the detector recontrast'):
        RD4AD(random(), DEFAULT)
    with pytest.raises(ValueError, match=r"form 'F' is unknown; choose one of A, B, C, C\+cp, D, E"):
        ReContrastConfig(form="F")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_norm 'on' is unknown; choose one of train, eval, guarded"):
        ReContrastConfig(batch_norm="on")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="encoder_rate 0 must be positive"):
        ReContrastConfig(encoder_rate=0)
    with pytest.raises(ValueError, match="bottleneck -1 must be 0, 2, 4"):
        ReContrastConfig(bottleneck=-1)
    with pytest.raises(ValueError, match="alpha nan must be a number of standard deviations"):
        ReContrastConfig(alpha=float("nan"))
    quick = ReContrastConfig(form="B", training=STEPS)
    backbone = load_backbone("lite0", image_size=SIDE, levels=[1, 3])
    with pytest.raises(ValueError, match=r"levels of 16 x 16, 4 x 4 do not make a pyramid: each must be"):
        RD4AD(backbone, quick).fit([photographs(2, 0)])
    odd = load_backbone("lite0", image_size=48, levels=[3])
    with pytest.raises(ValueError, match=r"levels of 3 x 3 do not make a pyramid.* a multiple of twice the coarsest"):
        RD4AD(odd, quick).fit([photographs(2, 0)[:, :, :48, :48]])
