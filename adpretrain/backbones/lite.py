"""`lite0`, `lite1`, `lite2`: EfficientNet-Lite up to stride 16, small networks trained on photographs (ImageNet).

The weights of `lite0` ship with the library, so that everything works without a download; those of the other two must
be given as ``weights=``. The network is timm's ``tf_efficientnet_lite*``, its batch norms folded into the convolutions
before them, which saves a third of the time on a CPU.

Levels are numbered by stride: 1 = stride 4, 2 = stride 8, 3 = stride 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from adpretrain.backbones.base import check_image_size, check_levels
from adpretrain.backbones.timm import Stages
from adpretrain.backbones.weights import StateDict, Weights, as_float32, load_strictly
from adpretrain.preprocess import Preprocess

STRIDES = (4, 8, 16)
HALF = (0.5, 0.5, 0.5)  # mean and std of the pixels that the network was trained on
BLOCKS = {  # each convolution of timm's blocks, with the batch norm after it
    "DepthwiseSeparableConv": (("conv_dw", "bn1"), ("conv_pw", "bn2")),
    "InvertedResidual": (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")),
}


def build(name: str, weights: Weights, image_size: int, levels: Sequence[int]) -> Stages:
    """The network up to the last of ``levels``. Raises ValueError for levels, a size or weights that do not fit.

    Weights are those of the whole network or of a part that is long enough, with timm's names or in the original file's
    order; or, with the batch norms folded, just those of the part that is built, as saved by a run that trains it.
    """
    chosen = check_levels(name, levels, len(STRIDES), "stages (of strides 4, 8 and 16)")
    check_image_size(name, image_size, STRIDES[chosen[-1] - 1], "its coarsest stride")
    network = features(name, chosen)
    if weights.random:
        fold(network)
    else:
        state, where, _ = weights.read()
        found = part(state, name, network)
        if found is not None:
            network.load_state_dict(as_float32(found))
        fold(network)
        if found is None:
            load_strictly(network, state, where, name)
    return Stages(network, name, Preprocess(image_size, None, HALF, HALF, "bicubic"), chosen)


def features(name: str, levels: Sequence[int]) -> Any:
    """timm's network up to its last wanted stage, with random weights and its batch norms."""
    import timm

    model = f"tf_efficientnet_{name}"
    network: Any = timm.create_model(model, pretrained=False, features_only=True, out_indices=list(levels)).eval()
    network.blocks = network.blocks[: network.feature_info.get_dicts()[-1]["stage"]]  # timm runs later ones too
    return network


def part(state: StateDict, name: str, network: Any) -> StateDict | None:
    """The tensors of ``network``, which ends at some stage, from those of a longer one: timm's, or the original file's,
    which have other names in the same order. None if ``state`` is neither."""
    import timm

    with torch.device("meta"):
        whole = timm.create_model(f"tf_efficientnet_{name}", pretrained=False).state_dict()
    if len(state) == len(whole) and not state.keys() & whole.keys():
        state = dict(zip(whole, state.values(), strict=True))
    wanted = network.state_dict()
    known = all(key in whole and value.shape == whole[key].shape for key, value in state.items())
    return {key: state[key] for key in wanted} if known and wanted.keys() <= state.keys() else None


def fold(network: Any) -> None:
    """Fold every batch norm of a network in evaluation mode into its convolution; only its activation remains."""
    _fold(network, "conv_stem", "bn1")
    for block in list(network.modules()):
        for convolution, norm in BLOCKS.get(type(block).__name__, ()):
            _fold(block, convolution, norm)


def _fold(module: Any, convolution: str, norm: str) -> None:
    found = getattr(module, norm)  # timm's norm with its activation, which the fusing would lose
    plain = nn.BatchNorm2d(found.num_features, eps=found.eps).eval()
    plain.load_state_dict(found.state_dict())
    setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), plain))
    setattr(module, norm, found.act)
