"""`clip-base`, `clip-large` (OpenAI) and `openclip-huge` (LAION-2B): the vision towers of CLIP, block outputs.

The towers are open_clip's, without the final norm and projection. OpenAI's networks were trained with the quick GELU
x * sigmoid(1.702 x); with the exact one the features are wrong without any error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adpretrain.backbones.base import Backbone, FeatureMaps, check_image_size, check_levels, resize_positions, token_map
from adpretrain.backbones.weights import StateDict, Weights, load_strictly
from adpretrain.extras import need
from adpretrain.preprocess import CLIP_MEAN, CLIP_STD, Preprocess

POSITIONS = "positional_embedding"


@dataclass(frozen=True)
class Tower:
    """Geometry of a vision tower. ``antialias``: whether resizing its position grid to other sizes antialiases."""

    width: int
    blocks: int
    heads: int
    patch: int
    quick_gelu: bool = False
    eps: float = 1e-5
    antialias: bool = True

    def network(self, image_size: int) -> Any:
        """open_clip's VisionTransformer without what comes after its last block."""
        need("clip", "open_clip")
        from open_clip.transformer import LayerNorm, QuickGELU, VisionTransformer  # type: ignore[import-untyped]

        network = VisionTransformer(
            image_size=image_size,
            patch_size=self.patch,
            width=self.width,
            layers=self.blocks,
            heads=self.heads,
            mlp_ratio=4.0,
            act_layer=QuickGELU if self.quick_gelu else nn.GELU,
            norm_layer=partial(LayerNorm, eps=self.eps),
        )
        network.prune_intermediate_layers(list(range(self.blocks)), prune_norm=True, prune_head=True)
        return network


TOWERS = {
    "clip-base": Tower(768, 12, 12, patch=16, quick_gelu=True),
    "clip-large": Tower(1024, 24, 16, patch=14, quick_gelu=True),
    "openclip-huge": Tower(1280, 32, 16, patch=14),
}


class VisionTower(Backbone):
    """Outputs of blocks ``levels`` as maps [B, width, S/patch, S/patch]: no class token, no final norm."""

    def __init__(
        self, network: Any, name: str, image_size: int, levels: list[int], revision: str | None = None
    ) -> None:
        super().__init__(
            name,
            channels=[network.conv1.out_channels] * len(levels),
            preprocess=Preprocess(image_size, mean=CLIP_MEAN, std=CLIP_STD),
            levels=levels,
            network=network,
            revision=revision,
        )
        self.indices = [level - 1 for level in levels]
        network.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)  # and unused last blocks

    def maps(self, images: Tensor) -> FeatureMaps:
        network: Any = self.network
        found = network.forward_intermediates(images, indices=self.indices, output_fmt="NLC", intermediates_only=True)
        return [token_map(tokens) for tokens in found["image_intermediates"]]


def build(
    name: str, weights: Weights, image_size: int, levels: Sequence[int], tower: Tower | None = None
) -> VisionTower:
    """A `VisionTower` of a published geometry, or of ``tower``. Raises ValueError for arguments that do not fit."""
    tower = tower or TOWERS[name]
    chosen = check_tower(name, tower, image_size, levels)
    if weights.random:
        return VisionTower(tower.network(image_size), name, image_size, chosen)
    state, where, revision = weights.read()
    return load_tower(name, tower, vision_part(state), where, image_size, chosen, revision)


def check_tower(name: str, tower: Tower, image_size: int, levels: Sequence[int]) -> list[int]:
    """The levels if they and the size fit, ValueError otherwise."""
    check_image_size(name, image_size, tower.patch, "its patch")
    return check_levels(name, levels, tower.blocks, "blocks")


def load_tower(
    name: str,
    tower: Tower,
    state: StateDict,
    where: str,
    image_size: int,
    levels: list[int],
    revision: str | None = None,
) -> VisionTower:
    """A tower with open_clip's ``visual`` weights, strictly; its position grid is resized if the size asks for it.

    Raises ValueError that names what was expected and found.
    """
    state = {key: value for key, value in state.items() if key != "proj" and not key.startswith("ln_post.")}
    if POSITIONS in state:
        try:
            positions = state[POSITIONS].float()
            state[POSITIONS] = resize_positions(positions, image_size // tower.patch, antialias=tower.antialias)
        except ValueError as error:
            raise ValueError(f"{where} is not a weights file of {name}: {error}") from None
    with torch.device("meta"):
        network = tower.network(image_size)
    load_strictly(network, state, where, name)
    return VisionTower(network, name, image_size, levels, revision)


def vision_part(state: StateDict) -> StateDict:
    """The tower's tensors from the file of a whole CLIP model, or from a file of the tower alone."""
    prefix = "visual."
    visual = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return visual or state
