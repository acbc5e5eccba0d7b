"""The authors' released projector checkpoints -> ours. Pure functions on state dicts: no files, no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from adpretrain.backbones import Backbone
from adpretrain.config import ProjectorConfig
from adpretrain.extractor import ADExtractor
from adpretrain.preprocess import crop_side
from adpretrain.projector import FeatureProjector

RELEASED_HEADS = 16
_RENAMED = {
    "layers.0.cross_attn.out_proj.weight": "attention.0.out.weight",
    "layers.0.cross_attn.out_proj.bias": "attention.0.out.bias",
    "layers.0.mlp.fc1.weight": "mlp.0.fc1.weight",
    "layers.0.mlp.fc1.bias": "mlp.0.fc1.bias",
    "layers.0.mlp.fc2.weight": "mlp.0.fc2.weight",
    "layers.0.mlp.fc2.bias": "mlp.0.fc2.bias",
    "layers.0.mlp.se.fc1.weight": "mlp.0.squeeze.weight",
    "layers.0.mlp.se.fc1.bias": "mlp.0.squeeze.bias",
    "layers.0.mlp.se.fc2.weight": "mlp.0.excite.weight",
    "layers.0.mlp.se.fc2.bias": "mlp.0.excite.bias",
    "ref_proj.project.bias": "reference_projection.bias",
}
_RESHAPED = (
    "x_ref",
    "ref_proj.project.weight",
    "layers.0.cross_attn.in_proj_weight",
    "layers.0.cross_attn.in_proj_bias",
)
_EXPECTED = frozenset(_RENAMED) | frozenset(_RESHAPED)


def _split_levels(state_dict: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    levels: dict[int, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        prefix, _, name = key.partition("_proj.")
        if not (prefix.startswith("l") and prefix[1:].isdigit() and name in _EXPECTED):
            raise ValueError(
                f"{key!r} is not a key of a released ADPretrain projector; expected l1_proj.x_ref, "
                "l1_proj.layers.0.cross_attn.in_proj_weight, ... (the dict under 'projectors' of the checkpoint)"
            )
        levels.setdefault(int(prefix[1:]), {})[name] = value
    if not levels or sorted(levels) != list(range(1, len(levels) + 1)):
        raise ValueError(f"expected levels l1, l2, ...; found {sorted(levels)}")
    for level, weights in levels.items():
        if missing := _EXPECTED - weights.keys():
            raise ValueError(f"level l{level} of the checkpoint lacks {sorted(missing)}")
        _check_shapes(level, weights)
    return [levels[level] for level in sorted(levels)]


def _check_shapes(level: int, weights: Mapping[str, Tensor]) -> None:
    """Check the tensors that are split or reshaped; `load_state_dict` checks the others."""
    shape = tuple(weights["x_ref"].shape)
    if len(shape) != 3 or shape[0] != 1:
        raise ValueError(f"l{level}_proj.x_ref is {list(shape)}, expected [1, N_r, C]")
    width = shape[2]
    for name, expected in zip(_RESHAPED[1:], ((width, width, 1), (3 * width, width), (3 * width,)), strict=True):
        if weights[name].shape != expected:
            raise ValueError(f"l{level}_proj.{name} is {list(weights[name].shape)}, expected {list(expected)}")


def _level_from_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    width = weights["x_ref"].shape[2]
    query_weight, key_value_weight = weights["layers.0.cross_attn.in_proj_weight"].split([width, 2 * width])
    query_bias, key_value_bias = weights["layers.0.cross_attn.in_proj_bias"].split([width, 2 * width])
    return {
        "references": weights["x_ref"][0],
        "reference_projection.weight": weights["ref_proj.project.weight"][:, :, 0],  # a 1x1 convolution
        "attention.0.query.weight": query_weight,
        "attention.0.query.bias": query_bias,
        "attention.0.key_value.weight": key_value_weight,
        "attention.0.key_value.bias": key_value_bias,
        **{ours: weights[theirs] for theirs, ours in _RENAMED.items()},
    }


def projector_from_official(state_dict: Mapping[str, Tensor]) -> FeatureProjector:
    """A released projector (the dict under ``["projectors"]``) as a `FeatureProjector` of form "released".

    Load the file with ``torch.load(path, weights_only=True)``. Raises ValueError that names the first key or shape that
    does not belong to such a checkpoint.
    """
    levels = _split_levels(state_dict)
    config = ProjectorConfig(
        references=levels[0]["x_ref"].shape[1],
        heads=RELEASED_HEADS,
        mlp_ratio=levels[0]["layers.0.mlp.fc1.weight"].shape[0] / levels[0]["x_ref"].shape[2],
        form="released",
    )
    projector = FeatureProjector([level["x_ref"].shape[2] for level in levels], config)
    renamed = {
        f"levels.{index}.{name}": value
        for index, level in enumerate(levels)
        for name, value in _level_from_official(level).items()
    }
    try:
        projector.load_state_dict({name: value.clone() for name, value in renamed.items()}, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint's shapes are not those of a released projector: {error}") from error
    return projector.eval()


def extractor_from_official(checkpoint: Any, backbone: Backbone, source: Mapping[str, Any]) -> ADExtractor:
    """A released checkpoint file's content as a complete `ADExtractor` on ``backbone``, as its authors run it.

    Cosine matching, the norm sqrt(||x|| + 1) - 1 and the released projector form; no local scale; the centres stay
    zero (the file has none, and scoring does not use them). A ``backbone`` that squeezes photographs is made to crop
    them as its authors' code does (256 -> 224 pixels). ``source`` (file name, sha256 ...) goes into the
    provenance, with the file's own metrics, which its authors measured on a test set and chose it by.

    Raises ValueError, with what was expected and found, if the content is not such a checkpoint or has other widths.
    """
    projectors = checkpoint.get("projectors") if isinstance(checkpoint, Mapping) else None
    if not isinstance(projectors, Mapping) or not all(isinstance(value, Tensor) for value in projectors.values()):
        if isinstance(checkpoint, Mapping):
            found = f"a dict with the keys {', '.join(map(repr, list(checkpoint)[:5])) or '(none)'}"
        else:
            found = f"a {type(checkpoint).__name__}"
        raise ValueError(
            "this is not a released ADPretrain checkpoint: expected a dict whose 'projectors' are tensors named "
            f"l1_proj.x_ref, ..., found {found}"
        )
    projector = projector_from_official(projectors)
    widths = [projectors[f"l{level + 1}_proj.x_ref"].shape[2] for level in range(len(projector.levels))]
    if widths != backbone.channels:
        raise ValueError(
            f"the checkpoint's {len(widths)} projectors have widths {widths}; backbone {backbone.name!r} gives "
            f"{backbone.channels}: name the backbone that the file was trained on (768: dinov2-base, clip-base; "
            "1024: dinov2-large, clip-large; 1280: imagebind)"
        )
    if backbone.preprocess.crop_from is None:
        backbone.preprocess = replace(backbone.preprocess, crop_from=crop_side(backbone.image_size, "crop"))
    recorded = {key: float(checkpoint[key]) for key in ("img_auc", "pix_auc", "pix_pro") if key in checkpoint}
    return ADExtractor(
        backbone,
        projector,
        matching="cosine",
        norm="released",
        provenance={
            "converted_from": dict(source),
            "released_metrics": recorded,
            "data": {"set": "Real-IAD"},  # as their paper and their repository say
            "note": "released by the authors of ADPretrain; the metrics are theirs, on the test set it was chosen on",
        },
    )
