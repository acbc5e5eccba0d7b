"""Rows of the table that timm computes, against the independent implementations of transformers and plain equations.

Small networks with random weights, published as a file under timm's names. B images, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import plain_vit as plain
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from adpretrain.backbones import BACKBONES, Backbone
from adpretrain.backbones.licences import LICENCES
from adpretrain.backbones.table import TIMM, find_entry
from adpretrain.backbones.timm import build
from adpretrain.backbones.weights import Weights

TOLERANCE = 1e-5
WIDTH, DEPTH, HEADS = 48, 4, 4
SMALL = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
LEVELS = [1, 2, 4]
SIDES = [224, 112]
ROWS = [name for name, entry in BACKBONES.items() if entry.family == "timm" and not name.startswith(TIMM)]


def model_of(name: str) -> str:
    return BACKBONES[name].source.repo_id.removeprefix(TIMM)


def small(name: str, path: Path, side: int, levels: list[int] = LEVELS, **geometry: Any) -> Backbone:
    """The row's network at a small size, with the weights of a file."""
    weights = Weights(name, BACKBONES[name].source, path=str(path))
    return build(name, weights, side, levels, **(geometry or SMALL))


def save(state: Mapping[str, Tensor], folder: Path) -> Path:
    save_file({key: value.contiguous().clone() for key, value in state.items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


def timms(name: str, **geometry: Any) -> Any:
    """timm's own network of a row, with random weights, at the size it was trained for."""
    return plain.lively(timm.create_model(model_of(name), **(geometry or SMALL)), spread=0.1)


def without(prefix: int, tokens: list[Tensor]) -> list[Tensor]:
    """[B, prefix + G * G, C] -> [B, C, G, G]."""
    return plain.as_maps([level[:, prefix - 1 :] for level in tokens])


def joined(state: Mapping[str, Tensor], block: str, names: tuple[str, str, str], kind: str = "weight") -> Tensor:
    return torch.cat([state[f"{block}.{name}.{kind}"] for name in names])


# DINOv2 with registers


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("swiglu", [False, True])
def test_dinov2_with_registers_equals_transformers(side: int, swiglu: bool, tmp_path: Path) -> None:
    name = "dinov2-reg-giant" if swiglu else "dinov2-reg-small"
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=518,
        patch_size=14,
        use_swiglu_ffn=swiglu,
    )
    theirs: Any = plain.lively(transformers.Dinov2WithRegistersModel(config), spread=0.1)
    pixels = plain.images(side)
    blocks = [theirs.encoder.layer[level - 1] for level in LEVELS]
    expected = without(5, plain.hooked(theirs, blocks, lambda: theirs(pixels)))
    geometry = {**SMALL, "mlp_ratio": 128 / 48 * 2} if swiglu else SMALL
    ours = small(name, save(original_registers(theirs, swiglu), tmp_path), side, **geometry)
    assert plain.error(ours(pixels), expected) < TOLERANCE


def original_registers(network: Any, swiglu: bool) -> dict[str, Tensor]:
    """The weights under the names of the original release."""
    w, parts = network.state_dict(), network.embeddings
    state = {
        "cls_token": parts.cls_token,
        "register_tokens": parts.register_tokens,
        "mask_token": parts.mask_token,
        "pos_embed": parts.position_embeddings,
        "patch_embed.proj.weight": parts.patch_embeddings.projection.weight,
        "patch_embed.proj.bias": parts.patch_embeddings.projection.bias,
        "norm.weight": network.layernorm.weight,
        "norm.bias": network.layernorm.bias,
    }
    for i in range(DEPTH):
        old, new = f"encoder.layer.{i}", f"blocks.{i}"
        for number in (1, 2):
            state[f"{new}.ls{number}.gamma"] = w[f"{old}.layer_scale{number}.lambda1"]
        for kind in ("weight", "bias"):
            state[f"{new}.attn.qkv.{kind}"] = joined(w, f"{old}.attention", ("q_proj", "k_proj", "v_proj"), kind)
            state[f"{new}.attn.proj.{kind}"] = w[f"{old}.attention.o_proj.{kind}"]
            for norm in ("norm1", "norm2"):
                state[f"{new}.{norm}.{kind}"] = w[f"{old}.{norm}.{kind}"]
            if swiglu:
                gate, up, down = (w[f"{old}.mlp.{part}_proj.{kind}"] for part in ("gate", "up", "down"))
                state[f"{new}.mlp.w12.{kind}"], state[f"{new}.mlp.w3.{kind}"] = torch.cat([gate, up]), down
            else:
                state[f"{new}.mlp.fc1.{kind}"] = w[f"{old}.mlp.fc1.{kind}"]
                state[f"{new}.mlp.fc2.{kind}"] = w[f"{old}.mlp.fc2.{kind}"]
    return {key: value.detach() for key, value in state.items()}


def test_dinov2_with_registers_antialiases_its_position_grid(tmp_path: Path) -> None:
    """As the original with registers does (interpolate_antialias=True, offset 0), in Pillow's own resize."""
    theirs = timms("dinov2-reg-base")
    ours: Any = small("dinov2-reg-base", save(theirs.state_dict(), tmp_path), 224).network
    old = theirs.pos_embed.detach()[0].reshape(37, 37, WIDTH)
    expected = plain.pillow_bicubic(old, 16).reshape(1, 256, WIDTH)
    assert plain.error([ours.pos_embed], [expected]) < TOLERANCE


# DINOv3


@pytest.mark.parametrize("side", SIDES)
def test_dinov3_equals_transformers(side: int, tmp_path: Path) -> None:
    config = transformers.DINOv3ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        num_register_tokens=4,
        query_bias=False,  # which is zero in all published weights; timm has none
        value_bias=False,
    )
    theirs: Any = plain.lively(transformers.DINOv3ViTModel(config), spread=0.1)
    pixels = plain.images(side)
    blocks = [theirs.model.layer[level - 1] for level in LEVELS]
    expected = without(5, plain.hooked(theirs, blocks, lambda: theirs(pixels)))
    w, parts = theirs.state_dict(), theirs.embeddings
    state = {
        "cls_token": parts.cls_token,
        "reg_token": parts.register_tokens,
        "patch_embed.proj.weight": parts.patch_embeddings.weight,
        "patch_embed.proj.bias": parts.patch_embeddings.bias,
        "norm.weight": theirs.norm.weight,
        "norm.bias": theirs.norm.bias,
    }
    for i in range(DEPTH):
        old, new = f"model.layer.{i}", f"blocks.{i}"
        state[f"{new}.attn.qkv.weight"] = joined(w, f"{old}.attention", ("q_proj", "k_proj", "v_proj"))
        for number in (1, 2):
            state[f"{new}.gamma_{number}"] = w[f"{old}.layer_scale{number}.lambda1"]
        for kind in ("weight", "bias"):
            state[f"{new}.attn.proj.{kind}"] = w[f"{old}.attention.o_proj.{kind}"]
            state[f"{new}.mlp.fc1.{kind}"] = w[f"{old}.mlp.up_proj.{kind}"]
            state[f"{new}.mlp.fc2.{kind}"] = w[f"{old}.mlp.down_proj.{kind}"]
            for norm in ("norm1", "norm2"):
                state[f"{new}.{norm}.{kind}"] = w[f"{old}.{norm}.{kind}"]
    ours = small("dinov3-small", save({key: value.detach() for key, value in state.items()}, tmp_path), side)
    assert plain.error(ours(pixels), expected) < TOLERANCE


@pytest.mark.parametrize("side", [224, 96])
def test_dinov3_convnext_equals_transformers(side: int, tmp_path: Path) -> None:
    widths, depths = [16, 24, 32, 48], [1, 2, 2, 1]
    config = transformers.DINOv3ConvNextConfig(hidden_sizes=widths, depths=depths)
    theirs: Any = plain.lively(transformers.DINOv3ConvNextModel(config), spread=0.1)
    pixels = plain.images(side)
    stages = next(module for module in theirs.modules() if isinstance(module, nn.ModuleList) and len(module) == 4)
    expected = plain.hooked(theirs, list(stages), lambda: theirs(pixels))
    geometry = {"dims": widths, "depths": depths}
    published = timm.create_model(model_of("dinov3-convnext-tiny"), **geometry).state_dict()
    values = [value for key, value in theirs.state_dict().items() if not key.startswith("layer_norm")]
    keys = [key for key in published if not key.startswith("head")]
    assert len(keys) == len(values)
    norm = {f"head.norm.{kind}": theirs.state_dict()[f"layer_norm.{kind}"] for kind in ("weight", "bias")}
    state = {key: value.reshape(published[key].shape) for key, value in zip(keys, values, strict=True)} | norm
    ours = small("dinov3-convnext-tiny", save(state, tmp_path), side, [1, 2, 3, 4], **geometry)
    assert plain.error(ours(pixels), expected) < TOLERANCE
    assert ours.preprocess.mean == (0.485, 0.456, 0.406)


# SigLIP 2


@pytest.mark.parametrize("side", SIDES)
def test_siglip2_equals_transformers(side: int, tmp_path: Path) -> None:
    published = timms("siglip2-base")
    state = published.state_dict()
    config = transformers.SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=side,
        patch_size=16,
    )
    theirs: Any = transformers.SiglipVisionModel(config).eval()
    positions = state["pos_embed"][0].reshape(14, 14, WIDTH)
    if side != 224:
        positions = plain.pillow_bicubic(positions, side // 16)  # timm antialiases; there is no published other grid
    renamed = {
        "embeddings.patch_embedding.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embedding.bias": state["patch_embed.proj.bias"],
        "embeddings.position_embedding.weight": positions.flatten(0, 1),
    }
    for i in range(DEPTH):
        for kind in ("weight", "bias"):
            old, new = f"blocks.{i}", f"encoder.layers.{i}"
            for part, value in zip("qkv", state[f"{old}.attn.qkv.{kind}"].chunk(3), strict=True):
                renamed[f"{new}.self_attn.{part}_proj.{kind}"] = value
            renamed[f"{new}.self_attn.out_proj.{kind}"] = state[f"{old}.attn.proj.{kind}"]
            for number in (1, 2):
                renamed[f"{new}.layer_norm{number}.{kind}"] = state[f"{old}.norm{number}.{kind}"]
                renamed[f"{new}.mlp.fc{number}.{kind}"] = state[f"{old}.mlp.fc{number}.{kind}"]
    tower = getattr(theirs, "vision_model", theirs)  # transformers 4 has it one deeper
    missing, surplus = tower.load_state_dict(renamed, strict=False)
    assert not surplus
    assert all(key.startswith(("head.", "post_layernorm.")) or key.endswith("position_ids") for key in missing)
    pixels = plain.images(side)
    found = plain.hooked(theirs, [tower.encoder.layers[level - 1] for level in LEVELS], lambda: theirs(pixels))
    expected = [level.transpose(1, 2).unflatten(2, (side // 16, side // 16)) for level in found]
    ours = small("siglip2-base", save(state, tmp_path), side)
    assert plain.error(ours(pixels), expected) < TOLERANCE
    assert (ours.preprocess.mean, ours.preprocess.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


# Perception Encoder


def rotary(grid: int, width: int) -> Callable[[Tensor], Tensor]:
    """Turns every pair of the channels [B, 1 + G * G, width] by its column times a frequency (first half) or its row
    (second half), both counted from 1; the class token stays."""
    frequencies = 10000.0 ** (-torch.arange(0, width // 2, 2, dtype=torch.float64) / (width // 2))
    places = torch.arange(1, grid + 1, dtype=torch.float64)
    columns, rows = places.repeat(grid), places.repeat_interleave(grid)
    angles = torch.cat([columns[:, None] * frequencies, rows[:, None] * frequencies], 1)
    angles = torch.cat([torch.zeros(1, width // 2, dtype=torch.float64), angles])

    def turn(x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(angles.new_ones(()), angles)
        return torch.view_as_real(turned).flatten(-2)

    return turn


@pytest.mark.parametrize("name", ["pe-core-base", "pe-spatial-base"])
@pytest.mark.parametrize("side", SIDES)
def test_the_perception_encoder_equals_its_equations(name: str, side: int, tmp_path: Path) -> None:
    """At other sizes than the trained one as in the original code: bilinear positions, rotary ones in patches."""
    geometry = {**SMALL, "attn_pool_num_heads": HEADS} if "core" in name else SMALL
    theirs = timms(name, **geometry)
    w = {key: value.double() for key, value in theirs.state_dict().items()}

    def pair(key: str) -> tuple[Tensor, Tensor]:
        return w[f"{key}.weight"], w[f"{key}.bias"]

    pixels, grid = plain.images(side), side // 16
    embedded = F.unfold(pixels.double(), 16, stride=16).transpose(1, 2) @ w["patch_embed.proj.weight"].flatten(1).T
    positions = plain.with_class_token(w["pos_embed"][0], lambda old: plain.bilinear(old, grid))
    tokens = torch.cat([w["cls_token"].expand(2, -1, -1), embedded], 1) + positions
    blocks = [
        plain.Block(
            pair(f"blocks.{i}.norm1"),
            pair(f"blocks.{i}.attn.qkv"),
            pair(f"blocks.{i}.attn.proj"),
            pair(f"blocks.{i}.norm2"),
            plain.two_layers(pair(f"blocks.{i}.mlp.fc1"), pair(f"blocks.{i}.mlp.fc2"), plain.gelu),
        )
        for i in range(DEPTH)
    ]
    start = plain.layer_norm(tokens, *pair("norm_pre"), 1e-5)
    outputs = plain.block_outputs(start, blocks, HEADS, 1e-5, rotary(grid, WIDTH // HEADS))
    ours = small(name, save(theirs.state_dict(), tmp_path), side, **geometry)
    assert plain.error(ours(pixels), [outputs[level - 1] for level in LEVELS]) < TOLERANCE
    assert ours.preprocess.interpolation == "bilinear"  # as its authors' transforms


@pytest.mark.parametrize("name", ["pe-spatial-small", "siglip2-base"])
def test_the_same_network_under_timm_s_name_is_timm_s_own(name: str, tmp_path: Path) -> None:
    file, pixels = save(timms(name).state_dict(), tmp_path), plain.images(112)
    own = f"{TIMM}{model_of(name)}"
    entry = find_entry(own)
    backbone = build(own, Weights(own, entry.source, path=str(file)), 112, LEVELS, **SMALL)
    theirs: Any = timm.create_model(
        model_of(name), pretrained=True, pretrained_cfg_overlay={"file": str(file)}, img_size=112, **SMALL
    ).eval()
    found = plain.hooked(theirs, [theirs.blocks[level - 1] for level in LEVELS], lambda: theirs(pixels))
    expected = [level[:, -49:].transpose(1, 2).unflatten(2, (7, 7)) for level in found]
    assert plain.error(backbone(pixels), expected) < TOLERANCE
    assert plain.error(small(name, file, 112)(pixels), expected) > 2 * TOLERANCE
    assert entry.licence == BACKBONES[name].licence  # the same weights


# C-RADIO


@pytest.mark.parametrize("names", ["timm", "NVIDIA"])
@pytest.mark.parametrize(("row", "corners"), [("c-radio-v3-large", False), ("c-radio-v3-base", True)])
@pytest.mark.parametrize("side", SIDES)
def test_c_radio_equals_transformers(row: str, corners: bool, side: int, names: str, tmp_path: Path) -> None:
    """The position grid is taken at 32 x 32; the networks of some sizes keep its corners when they resize it."""
    grid = plain.images(32, 1)[0, 0].flatten()[:, None] * torch.linspace(-1, 1, WIDTH)
    config = transformers.RadioConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        max_img_size=side if corners else 512,
        num_cls_tokens=3,
        num_registers=5,
        norm_mean=[0.0] * 3,
        norm_std=[1.0] * 3,
    )
    theirs: Any = plain.lively(transformers.RadioModel(config), spread=0.1)
    theirs.input_conditioner = nn.Identity()
    at = plain.bilinear(grid.reshape(32, 32, WIDTH), side // 16, corners=True).flatten(0, 1) if corners else grid
    theirs.embeddings.position_embedding.data = at[None].clone()
    pixels = plain.images(side)
    blocks = [theirs.encoder.layer[level - 1] for level in LEVELS]
    expected = without(8, plain.hooked(theirs, blocks, lambda: theirs(pixels)))
    file = save(radio_names(theirs, grid, names), tmp_path)
    ours = small(row, file, side)
    assert plain.error(ours(pixels), expected) < TOLERANCE
    assert ours.preprocess.mean == (0.48145466, 0.4578275, 0.40821073)


def radio_names(network: Any, grid: Tensor, names: str) -> dict[str, Tensor]:
    """The weights under timm's names, or under those of NVIDIA's file."""
    w = {key: value.detach() for key, value in network.state_dict().items()}
    prefix, parts = w["embeddings.cls_register_token"], w["embeddings.patch_projection.weight"]
    if names == "timm":
        root, state = (
            "",
            {
                "cls_token": prefix[None, :1],
                "reg_token": prefix[None, 1:],
                "pos_embed": grid[None],
                "patch_embed.proj.weight": parts.reshape(WIDTH, 3, 16, 16),
                "patch_embed.proj.bias": torch.zeros(WIDTH),
            },
        )
    else:
        root = "radio_model.model."
        state = {
            f"{root}patch_generator.embedder.weight": parts,
            f"{root}patch_generator.pos_embed": grid[None],
            f"{root}patch_generator.cls_token.token": prefix,
        }
    for i in range(DEPTH):
        old, new = f"encoder.layer.{i}", f"{root}blocks.{i}"
        for number in (1, 2):
            state[f"{new}.ls{number}.gamma"] = w[f"{old}.layer_scale{number}.lambda1"]
        for kind in ("weight", "bias"):
            state[f"{new}.attn.qkv.{kind}"] = joined(w, f"{old}.attention", ("q_proj", "k_proj", "v_proj"), kind)
            state[f"{new}.attn.proj.{kind}"] = w[f"{old}.attention.o_proj.{kind}"]
            for number in (1, 2):
                state[f"{new}.norm{number}.{kind}"] = w[f"{old}.norm{number}.{kind}"]
                state[f"{new}.mlp.fc{number}.{kind}"] = w[f"{old}.mlp.fc{number}.{kind}"]
    return state


# The table


@pytest.mark.parametrize("name", ROWS)
def test_levels_widths_and_licence_are_those_of_timm(name: str) -> None:
    entry, model = BACKBONES[name], model_of(name)
    config: Any = get_pretrained_cfg(model)
    assert config is not None
    assert entry.source.repo_id == config.hf_hub_id
    with torch.device("meta"):
        info = timm.create_model(model).feature_info
    info = info if isinstance(info, list) else info.get_dicts()
    quarters = [len(info) * quarter // 4 for quarter in (1, 2, 3, 4)]
    assert list(entry.levels) == quarters
    assert list(entry.channels) == [info[level - 1]["num_chs"] for level in quarters]
    assert entry.licence.lower().replace(" ", "-") == config.license
    assert entry.licence in LICENCES
