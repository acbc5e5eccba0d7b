"""Other weights are noticed; another dtype, or a file without values, is not mistaken for them."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from adpretrain.backbones import load_backbone
from adpretrain.backbones.weights import fingerprint, same_weights
from adpretrain.extractor import ADExtractor


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 32, 3), nn.Linear(32, 64))


def test_projections_equal_a_plain_loop() -> None:
    first = network(0)
    weight = first[0].weight.detach().flatten().tolist()
    expected = sum(value if index * 0.6180339887498949 % 1 < 0.5 else -value for index, value in enumerate(weight))
    assert fingerprint(first)[0] == pytest.approx(expected / sum(v * v for v in weight) ** 0.5, abs=1e-5)


def test_the_same_weights_in_half_precision_agree_and_slightly_changed_ones_do_not() -> None:
    first = network(0)
    assert same_weights(fingerprint(first), fingerprint(network(0).bfloat16()))
    assert same_weights(fingerprint(first), fingerprint(network(0).half()))
    assert not same_weights(fingerprint(first), fingerprint(network(1)))
    tuned = network(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1 * parameter.norm() / parameter.numel() ** 0.5 * torch.randn_like(parameter)
    assert not same_weights(fingerprint(first), fingerprint(tuned))


def test_unknown_weights_agree_with_any() -> None:
    assert fingerprint(None) == fingerprint(network(0).to("meta")) == []
    assert same_weights([], fingerprint(network(0)))


def test_an_extractor_refuses_other_weights_of_its_backbone(tmp_path: Path) -> None:
    name = "timm/resnet18.tv_in1k"
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / f"{seed}.pth")
    mine = load_backbone(name, weights=tmp_path / "0.pth")
    ADExtractor(mine).save_pretrained(tmp_path / "extractor")
    assert ADExtractor.from_pretrained(tmp_path / "extractor", weights=tmp_path / "0.pth").config.fingerprint
    with pytest.raises(ValueError, match=r"other weights of 'timm/resnet18.tv_in1k'.*weights=PATH"):
        ADExtractor.from_pretrained(tmp_path / "extractor", weights=tmp_path / "1.pth")
