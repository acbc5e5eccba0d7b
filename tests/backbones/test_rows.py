"""The rows of the table that timm computes: what the table says of them, and how they differ from timm's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plain_vit as plain
import pytest
import timm
import torch
from small_rows import (
    LEVELS,
    SMALL,
    TOLERANCE,
    model_of,
    needs,
    save,
    small,
    timms,
)
from timm.models import get_pretrained_cfg

from adpretrain.backbones import BACKBONES
from adpretrain.backbones.table import TIMM, find_entry
from adpretrain.backbones.timm import build
from adpretrain.backbones.weights import Source, Weights
from adpretrain.licences import LICENCES

ROWS = [name for name, entry in BACKBONES.items() if entry.family == "timm" and not name.startswith(TIMM)]


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


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in ROWS])
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


def test_a_row_that_the_installed_timm_is_too_old_for_says_so() -> None:
    weights = Weights("c-radio-v9", Source("model.safetensors", "timm/vit_base_patch16_radio_v9.c_radio"))
    with pytest.raises(ValueError, match=r"'c-radio-v9' needs a newer timm than .*`pip install --upgrade timm`"):
        build("c-radio-v9", weights, 224, LEVELS)
