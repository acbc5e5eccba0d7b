"""timm's networks against torchvision's (another library, the same weights) and timm's own unmodified forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import plain_vit as plain
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from adpretrain.backbones import BACKBONES, Backbone, load_backbone

TOLERANCE = 1e-5
Network = Callable[..., nn.Module]


def save(network: nn.Module, folder: Path) -> Path:
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.mark.parametrize(
    ("name", "make", "modules"),
    [
        ("resnet18.tv_in1k", torchvision.models.resnet18, "layer{}"),
        ("resnext50_32x4d.tv_in1k", torchvision.models.resnext50_32x4d, "layer{}"),
        ("densenet121.tv_in1k", torchvision.models.densenet121, "features.denseblock{}"),
    ],
)
def test_equals_torchvision_with_the_same_weights(name: str, make: Network, modules: str, tmp_path: Path) -> None:
    theirs = plain.lively(make(weights=None))
    file = save(theirs, tmp_path)
    for side in (224, 96):
        pixels = plain.images(side)
        backbone = load_backbone(f"timm/{name}", weights=file, image_size=side, levels=(1, 2, 3))
        taken = [theirs.get_submodule(modules.format(stage)) for stage in (1, 2, 3)]
        expected = plain.hooked(theirs, taken, lambda pixels=pixels: theirs(pixels))
        assert plain.error(backbone(pixels), expected) < TOLERANCE
        assert backbone.channels == [level.shape[1] for level in expected]
        assert [side // level.shape[2] for level in expected] == [4, 8, 16]


@pytest.mark.parametrize("name", [name for name in BACKBONES if name.startswith("timm/")])
def test_the_recommended_networks_are_torchvision_s(name: str) -> None:
    """Stage widths as torchvision has them; the whole state dict has the same tensors, so its files load."""
    architecture = name.removeprefix("timm/").split(".")[0]
    with torch.device("meta"):
        ours = timm.create_model(architecture)
        theirs = getattr(torchvision.models, architecture)(weights=None)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    if "densenet" in name:
        parts = theirs.features
        norms = [parts.transition1.norm, parts.transition2.norm, parts.transition3.norm, parts.norm5]
        widths = tuple(norm.num_features for norm in norms)
    else:
        widths = tuple(theirs.get_submodule(f"layer{stage}")[-1].conv3.out_channels for stage in (1, 2, 3, 4))
    assert BACKBONES[name].channels == widths
    assert BACKBONES[name].levels == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("name", "stages"),
    [("test_vit", None), ("test_convnext", (0, 1, 2, 3)), ("swin_tiny_patch4_window7_224", (0, 1, 2, 3))],
)
def test_equals_timm_s_own_forward(name: str, stages: tuple[int, ...] | None, tmp_path: Path) -> None:
    full = timm.list_pretrained(f"{name}.*")[0]
    theirs = plain.lively(timm.create_model(full))
    backbone = load_backbone(f"timm/{full}", weights=save(theirs, tmp_path), image_size=theirs_side(theirs))
    pixels = plain.images(backbone.image_size)
    if stages is None:
        count = len(theirs.blocks)
        assert backbone.levels == [count * quarter // 4 for quarter in (1, 2, 3, 4)]
        blocks = [theirs.blocks[level - 1] for level in backbone.levels]
        expected = plain.as_maps(plain.hooked(theirs, blocks, lambda: theirs(pixels)))
    else:
        modules = [theirs.stages[i] if hasattr(theirs, "stages") else theirs.layers[i] for i in stages]
        expected = plain.hooked(theirs, modules, lambda: theirs(pixels))
        if "swin" in name:
            expected = [level.permute(0, 3, 1, 2) for level in expected]
    assert plain.error(backbone(pixels), expected) < TOLERANCE


def theirs_side(network: nn.Module) -> int:
    return int(network.pretrained_cfg["input_size"][-1])


def test_a_vision_transformer_at_another_size_is_timm_s(tmp_path: Path) -> None:
    full = timm.list_pretrained("test_vit.*")[0]
    native = plain.lively(timm.create_model(full))
    file, pixels = save(native, tmp_path), plain.images(96)
    theirs = timm.create_model(full, img_size=96, pretrained=True, pretrained_cfg_overlay={"file": str(file)}).eval()
    backbone = load_backbone(f"timm/{full}", weights=file, image_size=96)
    assert not any(module.training for module in backbone.modules())  # detectors refuse it otherwise
    blocks = [theirs.blocks[level - 1] for level in backbone.levels]
    assert (
        plain.error(backbone(pixels), plain.as_maps(plain.hooked(theirs, blocks, lambda: theirs(pixels)))) < TOLERANCE
    )


def test_convolutions_run_in_channels_last() -> None:
    backbone = load_backbone("timm/resnet18.tv_in1k", pretrained=False, image_size=64)
    strides = {module.weight.is_contiguous(memory_format=torch.channels_last) for module in convolutions(backbone)}
    assert strides == {True}
    assert all(level.is_contiguous(memory_format=torch.channels_last) for level in backbone(plain.images(64)))


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)]


def test_preprocessing_is_that_of_the_weights() -> None:
    for full in ("resnet18.tv_in1k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"):
        data = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(full).to_dict())
        preprocess = load_backbone(f"timm/{full}", pretrained=False, levels=[1]).preprocess
        assert (preprocess.mean, preprocess.std) == (data["mean"], data["std"])
        assert preprocess.interpolation == data["interpolation"]


def test_a_level_more_or_less_changes_nothing_else(tmp_path: Path) -> None:
    file = save(plain.lively(timm.create_model("resnet18.tv_in1k")), tmp_path)
    pixels = plain.images(64)

    def load(levels: list[int] | None) -> Backbone:
        return load_backbone("timm/resnet18.tv_in1k", weights=file, image_size=64, levels=levels)

    everything, some = load(None), load([2, 3])
    assert everything.levels == [1, 2, 3, 4]
    assert some.channels == everything.channels[1:3]
    assert plain.error(some(pixels), everything(pixels)[1:3]) == 0
    assert not any(name.startswith("network.layer4") for name, _ in some.named_parameters())


def edited(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    return {name: value for name, value in (state | changes).items() if value is not None}


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"timm has no model 'wide_resnet50'; similar names: .*wide_resnet50_2"):
        load_backbone("timm/wide_resnet50", pretrained=False)
    with pytest.raises(ValueError, match=r"no weights 'wide_resnet50_2\.tv'; it has .*timm/wide_resnet50_2\.tv_in1k"):
        load_backbone("timm/wide_resnet50_2.tv")
    with pytest.raises(ValueError, match=r"without saying which of its weights; .*timm/wide_resnet50_2\.tv2_in1k"):
        load_backbone("timm/wide_resnet50_2")
    with pytest.raises(ValueError, match=r"list some of its stages 1, 2, 3, 4, in"):
        load_backbone("timm/resnet18.tv_in1k", levels=[5])
    with pytest.raises(ValueError, match=r"coarsest stride \(32 pixels\), got 230: choose 224 or 256"):
        load_backbone("timm/resnet18.tv_in1k", image_size=230)
    assert load_backbone("timm/resnet18.tv_in1k", pretrained=False, image_size=240, levels=[1, 2, 3]).image_size == 240
    state = timm.create_model("resnet18.tv_in1k").state_dict()
    for change in (
        {"layer2.0.conv1.weight": None},
        {"surplus": torch.zeros(1)},
        {"conv1.weight": torch.zeros(64, 3, 3, 3)},
    ):
        torch.save(edited(state, **change), tmp_path / "w.pth")
        key = next(iter(change))
        with pytest.raises(ValueError, match=rf"(?s)w\.pth is not a weights file of timm/resnet18\.tv_in1k: .*{key}"):
            load_backbone("timm/resnet18.tv_in1k", weights=tmp_path / "w.pth")
