"""DINOv2 with registers and DINOv3 (of timm) against transformers, an independent implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plain_vit as plain
import pytest
import timm
import torch
from small_rows import (
    DEPTH,
    HEADS,
    LEVELS,
    SIDES,
    SMALL,
    TOLERANCE,
    WIDTH,
    joined,
    model_of,
    save,
    small,
    timms,
    without,
)
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5.24")  # whose modules are named as here


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
