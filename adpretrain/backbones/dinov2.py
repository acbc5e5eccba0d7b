"""`dinov2-small`, `-base`, `-large`, `-giant`: DINOv2 vision transformers, the block outputs that ADPretrain uses.

Patch 14, trained at 518 px (37 x 37 tokens). For other sizes the position grid is interpolated as in the original code
(see `resize_positions`); transformers' own interpolation moves the block features by 0.9 %. The network itself is
transformers'.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from adpretrain.backbones.base import Backbone, FeatureMaps, check_image_size, check_levels, resize_positions, token_map
from adpretrain.backbones.weights import StateDict, Weights, as_float32, refuse_misfit
from adpretrain.extras import need
from adpretrain.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

if TYPE_CHECKING:
    from transformers import Dinov2Config, Dinov2Model

PATCH, TRAINED_SIDE = 14, 518
OFFSET = 0.1  # of the original interpolation


@dataclass(frozen=True)
class Size:
    """A published size of the network."""

    width: int
    blocks: int
    heads: int
    swiglu: bool = False

    def config(self) -> Dinov2Config:
        from transformers import Dinov2Config

        return Dinov2Config(
            hidden_size=self.width,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            use_swiglu_ffn=self.swiglu,
            image_size=TRAINED_SIDE,
            patch_size=PATCH,
            layer_norm_eps=1e-6,
        )


SIZES = {
    "dinov2-small": Size(384, 12, 6),
    "dinov2-base": Size(768, 12, 12),
    "dinov2-large": Size(1024, 24, 16),
    "dinov2-giant": Size(1536, 40, 24, swiglu=True),
}


class DinoV2(Backbone):
    """Outputs of blocks ``levels`` as maps [B, width, S/14, S/14]: no class token, no final norm.

    ``network`` is a transformers Dinov2Model of any geometry with its position grid as trained. Raises ValueError for
    levels or a size that do not fit it.
    """

    def __init__(
        self, network: Dinov2Model, name: str, image_size: int, levels: Sequence[int], revision: str | None = None
    ) -> None:
        config: Any = network.config
        check_image_size(name, image_size, config.patch_size, "its patch")
        chosen = check_levels(name, levels, config.num_hidden_layers, "blocks")
        super().__init__(
            name,
            channels=[config.hidden_size] * len(chosen),
            preprocess=Preprocess(image_size, mean=IMAGENET_MEAN, std=IMAGENET_STD),
            levels=chosen,
            network=network,
            revision=revision,
        )
        # transformers uses a position grid of the input's size unchanged.
        positions = network.embeddings.position_embeddings.detach()[0]
        resized = resize_positions(positions, image_size // config.patch_size, OFFSET)
        network.embeddings.position_embeddings = nn.Parameter(resized[None].clone(), requires_grad=False)
        network.encoder.layer = network.encoder.layer[: chosen[-1]]

    def maps(self, images: Tensor) -> FeatureMaps:
        network: Any = self.network
        tokens, maps = network.embeddings(images), []
        for number, block in enumerate(network.encoder.layer, start=1):
            tokens = block(tokens)
            tokens = tokens[0] if isinstance(tokens, tuple) else tokens  # transformers 4 wraps it
            if number in self.levels:
                maps.append(token_map(tokens[:, 1:]))
        return maps


def build(
    name: str, weights: Weights, image_size: int, levels: Sequence[int], config: Dinov2Config | None = None
) -> DinoV2:
    """A `DinoV2` of a published size, or of ``config``. Raises ValueError for arguments that do not fit."""
    need("dinov2", "transformers")
    geometry: Any = config or SIZES[name].config()
    check_image_size(name, image_size, geometry.patch_size, "its patch")
    check_levels(name, levels, geometry.num_hidden_layers, "blocks")
    if weights.random:
        from transformers import Dinov2Model

        return DinoV2(Dinov2Model(geometry), name, image_size, levels)
    state, where, revision = weights.read()
    return DinoV2(load(geometry, state, where, name), name, image_size, levels, revision)


def load(config: Dinov2Config, state: StateDict, where: str, name: str) -> Dinov2Model:
    """The network with the weights of a transformers file or of the original release, strictly, in float32.

    Raises ValueError that names what was expected and found.
    """
    from transformers import Dinov2Model

    if "pos_embed" in state:
        state = from_original(state)
    # transformers translates between the layouts of its versions; given a state_dict, it downloads nothing.
    with quiet():
        loaded: Any = Dinov2Model.from_pretrained(
            None,
            config=config,
            state_dict=as_float32(state),
            ignore_mismatched_sizes=True,  # reported below, with everything else
            output_loading_info=True,
        )
    network, report = loaded
    shapes = [(key, list(found), list(expected)) for key, found, expected in report["mismatched_keys"]]
    refuse_misfit(name, where, sorted(report["missing_keys"]), sorted(report["unexpected_keys"]), shapes)
    return network


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and warnings; a faulty file is reported by an exception."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


ORIGINAL_NAMES = [  # of the original release -> transformers, as patterns
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^mask_token$", "embeddings.mask_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
]


def from_original(state: StateDict) -> StateDict:
    """Names and tensors of the original release (dinov2_vit*14_pretrain.pth) -> those of transformers' files."""
    converted = {}
    for key, value in state.items():
        for pattern, replacement in ORIGINAL_NAMES:
            key = re.sub(pattern, replacement, key)
        if ".attn.qkv." in key:
            for part, tensor in zip(("query", "key", "value"), value.chunk(3), strict=True):
                converted[key.replace(".attn.qkv.", f".attention.attention.{part}.")] = tensor
        else:
            converted[key] = value
    return converted
