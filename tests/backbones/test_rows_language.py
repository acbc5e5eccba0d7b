"""SigLIP 2, the Perception Encoder and C-RADIO (of timm) against transformers and plain equations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_vit as plain
import pytest
import torch
import torch.nn.functional as F
from small_rows import (
    DEPTH,
    HEADS,
    LEVELS,
    SIDES,
    SMALL,
    TOLERANCE,
    WIDTH,
    joined,
    needs,
    save,
    small,
    timms,
    without,
)
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5.24")  # whose modules are named as here


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


# C-RADIO


@needs("c-radio-v3-large", "c-radio-v3-base")
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
