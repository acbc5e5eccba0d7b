"""Rows of the table that timm computes, at a small size and with random weights from a file: what their tests share.

B images, T tokens, C channels, G grid side.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plain_vit as plain
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from adpretrain.backbones import BACKBONES, Backbone
from adpretrain.backbones.table import TIMM
from adpretrain.backbones.timm import build
from adpretrain.backbones.weights import Weights

TOLERANCE = 1e-5
WIDTH, DEPTH, HEADS = 48, 4, 4
SMALL = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
LEVELS = [1, 2, 4]
SIDES = [224, 112]


def needs(*rows: str) -> pytest.MarkDecorator:
    """Skips a test where the installed timm is too old for a row, as it is for C-RADIO at the lower bound."""
    absent = [row for row in rows if not timm.is_model(model_of(row).partition(".")[0])]
    return pytest.mark.skipif(bool(absent), reason=f"timm {timm.__version__} has no {', '.join(absent)}")


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
