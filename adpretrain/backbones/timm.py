"""`timm/<model name>`: any feature network of timm. Convolutional and hierarchical networks give stages, plain vision
transformers give blocks.

A stage is named by its stride: stage 1 is the last map of stride 4, stage 2 of stride 8, and so on (layer1 .. layer4
of a ResNet). The name must carry the tag of the weights (``wide_resnet50_2.tv_in1k``) where a network has several.
timm resizes position embeddings with antialiasing: for the paper's DINOv2 use `dinov2-base`.

Rows of the table with names of their own (`dinov3-base`, `siglip2-base`) are networks of timm too. Where timm departs
from their authors' code, they follow the authors (`corrections`, `as_original`); ``timm/<model name>`` is timm's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adpretrain.backbones.base import Backbone, FeatureMaps, check_image_size, check_levels, resize_positions
from adpretrain.backbones.table import TIMM
from adpretrain.backbones.weights import Source, StateDict, Weights, as_float32, load_strictly
from adpretrain.preprocess import INTERPOLATIONS, Preprocess

FINEST = 4  # stride of stage 1
DEPTH = 4  # levels of a vision transformer by default, evenly spaced as in the paper
PERCEPTION, SIGLIP = "pe-", "siglip2-"  # rows of the table with `corrections`


class Stages(Backbone):
    """Maps [B, C_l, S/stride_l, S/stride_l] of the named stages; the network runs in channels_last."""

    def __init__(self, network: Any, name: str, preprocess: Preprocess, levels: list[int], **more: Any) -> None:
        super().__init__(
            name,
            channels=network.feature_info.channels(),
            preprocess=preprocess,
            levels=levels,
            network=network.to(memory_format=torch.channels_last),
            **more,
        )

    def maps(self, images: Tensor) -> FeatureMaps:
        network: Any = self.network
        maps = network(images.contiguous(memory_format=torch.channels_last))
        if str(getattr(network, "output_fmt", "")).endswith("NHWC"):  # some transformers with stages
            return [level.permute(0, 3, 1, 2) for level in maps]
        return maps


class Blocks(Backbone):
    """Outputs of the named blocks of a plain vision transformer, [B, width, G, G]: no class token, no final norm."""

    def __init__(self, network: Any, name: str, preprocess: Preprocess, levels: list[int], **more: Any) -> None:
        channels = [network.feature_info[level - 1]["num_chs"] for level in levels]
        super().__init__(name, channels, preprocess, levels, network, **more)
        self.indices = [level - 1 for level in levels]
        network.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        self.eval()  # what pruning put in place is new, and in training mode

    def maps(self, images: Tensor) -> FeatureMaps:
        network: Any = self.network
        return network.forward_intermediates(
            images, indices=self.indices, norm=False, output_fmt="NCHW", intermediates_only=True
        )


def build(name: str, weights: Weights, image_size: int, levels: Sequence[int], **geometry: Any) -> Backbone:
    """The network ``timm/<model name>``, or a row of the table. ``levels`` empty = the default: all stages, or four
    evenly spaced blocks. ``geometry``: arguments of timm's network (depth, width ...) in place of the published ones.

    Raises ValueError for an unknown model, levels or a size that do not fit, or weights that are not its own.
    """
    from timm.models import PretrainedCfg, get_pretrained_cfg

    model = full_name(name, weights)
    name = f"{TIMM}{model}" if name.startswith(TIMM) else name
    config: Any = get_pretrained_cfg(model) or PretrainedCfg()
    weights = dataclasses.replace(weights, backbone=name, source=Source("model.safetensors", config.hf_hub_id or name))
    sized = {**geometry, "img_size": image_size} if config.fixed_input_size else geometry
    interpolation = config.interpolation if config.interpolation in INTERPOLATIONS else "bicubic"
    if name.startswith(PERCEPTION):
        interpolation = "bilinear"  # as its authors' transforms; timm says bicubic
    preprocess = Preprocess(image_size, None, config.mean, config.std, interpolation)
    info = _feature_info(model, geometry)
    strides = [entry["reduction"] for entry in info]
    if len(info) > 1 and len(set(strides)) == 1:
        default = [len(info) * (i + 1) // DEPTH for i in range(DEPTH)]
        chosen = check_levels(name, levels or default, len(info), "blocks")
        check_image_size(name, image_size, strides[0], "its patch")
        sized = {**sized, **corrections(name, image_size // strides[0])}
        network, revision = _whole(name, model, weights, sized)
        return Blocks(network, name, preprocess, chosen, revision=revision)
    stages = [index for index, stride in enumerate(strides) if stride >= FINEST]
    chosen = check_levels(name, levels or range(1, len(stages) + 1), len(stages), "stages")
    indices = [stages[level - 1] for level in chosen]
    check_image_size(name, image_size, strides[indices[-1]], "its coarsest stride")
    network, revision = _features(name, model, weights, sized, indices)
    return Stages(network, name, preprocess, chosen, revision=revision)


def full_name(name: str, weights: Weights) -> str:
    """The model name with the tag of its weights. Raises ValueError if timm has no such weights, or several."""
    import timm

    assert weights.source is not None
    model = weights.source.repo_id.removeprefix(TIMM)
    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture) and not name.startswith(TIMM):
        raise ValueError(
            f"backbone {name!r} needs a newer timm than {timm.__version__}, which has no {architecture!r}: run "
            "`pip install --upgrade timm`"
        )
    if not timm.is_model(architecture):
        close = timm.list_models(f"*{architecture[:8]}*")[:8]
        hint = f"similar names: {', '.join(close)}" if close else "timm.list_models() lists all"
        raise ValueError(f"timm has no model {architecture!r}; {hint}")
    published = list(timm.list_pretrained(f"{architecture}.*"))
    choice = ", ".join(f"{TIMM}{known}" for known in published) or "none: pass weights=PATH or pretrained=False"
    if tag and model not in published:
        raise ValueError(f"timm has no weights {model!r}; it has {choice}")
    if not tag and len(published) == 1:
        return published[0]
    if not tag and not weights.random and weights.path is None:
        raise ValueError(f"{name} names a network without saying which of its weights; choose one of: {choice}")
    return model


def _feature_info(model: str, geometry: dict[str, Any]) -> list[dict[str, Any]]:
    """The features that a network offers, in order: num_chs and reduction (stride) of each."""
    import timm

    try:
        with torch.device("meta"):
            found = timm.create_model(model, pretrained=False, **geometry)
    except (RuntimeError, NotImplementedError):  # some constructors compute with tensors
        found = timm.create_model(model, pretrained=False, **geometry)
    info = getattr(found, "feature_info", None)
    if not info:
        raise ValueError(f"timm's {model!r} has no feature maps to take; choose another model")
    return list(info) if isinstance(info, list) else info.get_dicts()


def _whole(name: str, model: str, weights: Weights, sized: dict[str, Any]) -> tuple[Any, str | None]:
    """The complete network, classifier included, loaded strictly, and the commit of its weights."""
    import timm

    if weights.random:
        return timm.create_model(model, pretrained=False, **sized), None
    return _loaded(name, model, weights.read(), sized)


def _loaded(
    name: str, model: str, read: tuple[StateDict, str, str | None], sized: dict[str, Any]
) -> tuple[Any, str | None]:
    import timm

    state, where, revision = read
    try:
        overlay = {"state_dict": as_original(as_float32(state), sized)}
        network: Any = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **sized)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:3])
        raise ValueError(f"{where} is not a weights file of {name}: {reason}") from error
    network.pretrained_cfg.pop("state_dict", None)  # timm keeps a copy of the weights
    return network, revision


def corrections(name: str, grid: int) -> dict[str, Any]:
    """Arguments with which timm's network of a row computes what its authors' does on ``grid`` x ``grid`` patches.

    The Perception Encoder's rotary positions count patches whatever the size; timm stretches them over the grid of the
    training unless told that this grid was the wanted one. SigLIP 2 was trained in JAX, whose GELU is the approximation
    by tanh; timm computes the exact one.
    """
    if name.startswith(PERCEPTION):
        return {"ref_feat_shape": (grid, grid)}
    return {"act_layer": "gelu_tanh"} if name.startswith(SIGLIP) else {}


def as_original(state: StateDict, sized: dict[str, Any]) -> StateDict:
    """The Perception Encoder's weights with the position grid of the wanted size, interpolated bilinearly as in the
    original code; timm would do it bicubically with antialiasing. Weights of other networks stay as they are."""
    if "ref_feat_shape" not in sized or "pos_embed" not in state:
        return state
    positions = resize_positions(state["pos_embed"][0], sized["ref_feat_shape"][0], mode="bilinear")
    return {**state, "pos_embed": positions[None]}


def _features(
    name: str, model: str, weights: Weights, sized: dict[str, Any], indices: list[int]
) -> tuple[Any, str | None]:
    """The network up to its last wanted stage. timm loads such a part unchecked, so the whole network is loaded first,
    unless the file holds just that part, as saved by a run that trains the backbone."""
    import timm

    network: Any = timm.create_model(model, pretrained=False, features_only=True, out_indices=indices, **sized)
    if weights.random:
        return network, None
    wanted, read = network.state_dict(), weights.read()
    if read[0].keys() == wanted.keys():
        load_strictly(network, read[0], read[1], name)
        return network, read[2]
    whole, revision = _loaded(name, model, read, sized)
    # features_only renames what it flattens: "features.conv0" becomes "features_conv0".
    tensors: StateDict = {_plain(key): value for key, value in whole.state_dict().items()}
    part = {key: tensors[_plain(key)] for key in wanted if _plain(key) in tensors}
    load_strictly(network, part, name, name)
    return network, revision


def _plain(key: str) -> str:
    return key.removeprefix("model.").replace("_", ".")
