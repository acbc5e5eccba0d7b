"""`imagebind`: the vision tower of ImageBind (huge), from the released `imagebind_huge.pth`. Not for commercial use.

A ViT-H/14 with LayerNorm eps 1e-6 and the exact GELU, made for two-frame clips. A photograph is one frame shown
twice, so that the 3-D convolution of the stem is the 2-D one of its weights summed over time. Only the vision part of
the file is read. `openclip-huge` is the free alternative of the same geometry.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from adpretrain.backbones.clip import Tower, VisionTower, check_tower, load_tower
from adpretrain.backbones.weights import StateDict, Weights

HUGE = Tower(1280, 32, 16, patch=14, eps=1e-6, antialias=False)
VISION = re.compile(r"^modality_(preprocessors|trunks|heads)\.vision\.")
STEM = "conv1.weight"

NAMES = [  # of the released file -> open_clip's tower, as patterns
    (r"^modality_preprocessors\.vision\.cls_token$", "class_embedding"),
    (r"^modality_preprocessors\.vision\.pos_embedding_helper\.pos_embed$", "positional_embedding"),
    (r"^modality_preprocessors\.vision\.rgbt_stem\.proj\.1\.weight$", STEM),
    (r"^modality_trunks\.vision\.pre_transformer_layer\.0\.", "ln_pre."),
    (r"^modality_trunks\.vision\.blocks\.", "transformer.resblocks."),
    (r"^modality_heads\.vision\.0\.", "ln_post."),
    (r"^modality_heads\.vision\.2\.weight$", "proj"),
    (r"\.norm_([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
]


def build(name: str, weights: Weights, image_size: int, levels: Sequence[int], tower: Tower = HUGE) -> VisionTower:
    """ImageBind's `VisionTower`. Raises ValueError for arguments that do not fit."""
    chosen = check_tower(name, tower, image_size, levels)
    if weights.random:
        return VisionTower(tower.network(image_size), name, image_size, chosen)
    state, where, revision = weights.read()
    return load_tower(name, tower, vision_part(state, where), where, image_size, chosen, revision)


def vision_part(state: StateDict, where: str) -> StateDict:
    """Names and tensors of the released file -> open_clip's tower; other modalities are left out.

    Raises ValueError if the file has no vision part.
    """
    converted = {}
    for key, value in state.items():
        if not VISION.match(key):
            continue
        for pattern, replacement in NAMES:
            key = re.sub(pattern, replacement, key)
        if key == STEM:
            value = value.float().sum(2)  # [D, 3, 2, 14, 14] -> [D, 3, 14, 14]
        elif key == "class_embedding":
            value = value.reshape(-1)
        elif key == "positional_embedding":
            value = value.reshape(-1, value.shape[-1])
        converted[key] = value
    if not converted:
        raise ValueError(
            f"{where} is not imagebind_huge.pth: it has no weights named modality_trunks.vision..., but "
            f"{', '.join(list(state)[:3])} ..."
        )
    return converted
