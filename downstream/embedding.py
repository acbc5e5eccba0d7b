"""Turn feature maps into one vector per patch, as PatchCore, PaDiM, SPADE and ReConPatch need them.

Chosen levels -> average over the p x p neighbourhood (PatchCore Eq. 1-3) -> fewer channels per level -> the grid of
the finest chosen level (bilinear) -> concatenated -> fewer channels.

The order differs from ReConPatch Sec. 3.1, which first brings the levels to one grid, then concatenates them and last
averages the p x p neighbourhoods of that grid. PatchCore Sec. 3.2 and its released code average every level on its own
grid before upsampling it, and so do we for all detectors, because p patches of a coarse level cover more of the image
than p patches of the finest grid. We pool channels before upsampling: both are linear and act on different axes, so the
result is the same up to rounding, but the maps are smaller.

Shapes: B images, L levels, C_l channels, H_l x W_l tokens, H x W the embedding's grid, D its channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.backbones.timm import Stages

REDUCTIONS = ("pool", "project", "choose", "orthogonal")
FORMS = ("paper", "released")


@dataclass(frozen=True)
class EmbeddingConfig:
    """How feature maps become patch embeddings.

    Args:
        levels: levels of the extract, counted from 0 (-1 = the last); null = all. "paper" means, for a timm backbone
            with stages (such as a ResNet) or an extractor on one, the stages that the detector's paper uses: 2 and 3
            for PatchCore and ReConPatch, 1 to 3 for PaDiM and SPADE, as far as the backbone has them. For any other
            network (vision transformers, your own functions), which the papers do not cover, it means all levels.
        patch: side p of the neighbourhood that is averaged, odd; 1 = no averaging. Outside the border there are zeros,
            which count in the average, as in the released PatchCore.
        stride: s; every s-th position in both directions is kept (Eq. 3).
        level_dim: channels of each level after adaptive average pooling; null = no pooling.
        target_dim: channels of the concatenation after ``reduction``; null = no reduction.
        reduction: "pool" (adaptive average pooling, PatchCore), "project" (Gaussian random projection), "choose"
            (random channels, PaDiM) or "orthogonal" (random semi-orthogonal matrix).
        form: "paper" averages the neighbourhood, then pools channels; "released" pools the p * p * C_l values of a
            neighbourhood together, as the authors' code does. Equal wherever level_dim divides C_l or is null.
        seed: random seed of the reductions.
    """

    levels: list[int] | Literal["paper"] | None = "paper"
    patch: int = 3
    stride: int = 1
    level_dim: int | None = None
    target_dim: int | None = None
    reduction: Literal["pool", "project", "choose", "orthogonal"] = "pool"
    form: Literal["paper", "released"] = "paper"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.patch < 1 or self.patch % 2 == 0:
            raise ValueError(f"patch {self.patch} must be odd and at least 1, such as 3: it needs a centre")
        if self.stride < 1:
            raise ValueError(f"stride {self.stride} must be at least 1")
        for name, value in (("level_dim", self.level_dim), ("target_dim", self.target_dim)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1, or null for all channels")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction {self.reduction!r} is unknown; choose one of {REDUCTIONS}")
        if self.form not in FORMS:
            raise ValueError(f"form {self.form!r} is unknown; choose one of {FORMS}")
        if self.reduction != "pool" and self.target_dim is None:
            raise ValueError(f"reduction {self.reduction!r} needs target_dim, the number of channels to keep")


DEFAULT = EmbeddingConfig()


class Embedding(nn.Module):
    """Feature maps -> patch embeddings [B, H, W, D], float32 (float64 if the features are). It has no parameters.

    A random reduction is drawn in the first call, when the number of channels is known, and then kept as the buffer
    ``reducer``: [D'] indices for "choose", a matrix [C, D] otherwise.
    """

    def __init__(self, config: EmbeddingConfig = DEFAULT) -> None:
        super().__init__()
        self.config = config
        self.reducer: Tensor | None
        self.register_buffer("reducer", None)

    def forward(self, features: FeatureMaps) -> Tensor:
        """L levels [B, C_l, H_l, W_l] -> [B, H, W, D]. Raises ValueError if levels or channels do not fit."""
        config = self.config
        levels = [aggregate(level, config) for level in chosen_levels(features, config.levels)]
        joined_BCHW = on_one_grid(levels)
        if config.target_dim is None:
            return joined_BCHW.permute(0, 2, 3, 1).contiguous()
        if config.reduction == "pool":
            return pool_channels(joined_BCHW, config.target_dim).permute(0, 2, 3, 1).contiguous()
        width = joined_BCHW.shape[1]
        if self.reducer is None:
            reducer = random_reducer(width, config.target_dim, config.reduction, config.seed)
            self.reducer = reducer.to(joined_BCHW.device)
        if config.reduction == "choose":
            if not torch.compiler.is_compiling() and int(self.reducer.amax()) >= width:  # a graph was fitted on these
                raise ValueError(f"features have {width} channels, fewer than those that channels were chosen from")
            return joined_BCHW[:, self.reducer].permute(0, 2, 3, 1).contiguous()
        if self.reducer.shape[0] != width:
            raise ValueError(f"features have {width} channels, the projection was drawn for {self.reducer.shape[0]}")
        return joined_BCHW.permute(0, 2, 3, 1) @ self.reducer.to(joined_BCHW.dtype)


def settle_levels(config: EmbeddingConfig, extract: Extract, stages: Sequence[int]) -> EmbeddingConfig:
    """Replace "paper" by the levels that it means on this extract; ``stages`` are those that the paper uses."""
    if config.levels != "paper":
        return config
    backbone = getattr(extract, "backbone", extract)
    given = backbone.levels if isinstance(backbone, Stages) else []
    return replace(config, levels=[level for level, stage in enumerate(given) if stage in stages] or None)


def chosen_levels(features: FeatureMaps, levels: Sequence[int] | Literal["paper"] | None) -> FeatureMaps:
    """Return the chosen levels, in the given order; all for null, and for a "paper" that `settle_levels` has not
    replaced. Raises ValueError that names the valid numbers."""
    count = len(features)
    if count == 0:
        raise ValueError("there are no levels of features: an embedding needs at least one")
    if levels is None or levels == "paper":
        return list(features)
    if not levels or any(not -count <= level < count for level in levels):
        raise ValueError(f"levels {list(levels)} do not fit features of {count} levels; choose from 0 to {count - 1}")
    return [features[level] for level in levels]


def aggregate(feature_BCHW: Tensor, config: EmbeddingConfig) -> Tensor:
    """Average neighbourhoods of a level, P_{s,p} (PatchCore Eq. 3), pool channels: [B, level_dim or C, H/s, W/s]."""
    if not feature_BCHW.is_floating_point() or feature_BCHW.ndim != 4 or 0 in feature_BCHW.shape[1:]:
        raise ValueError(
            f"features must be [B, C, H, W] floats, C, H and W at least 1, got {tuple(feature_BCHW.shape)} "
            f"{feature_BCHW.dtype}"
        )
    feature_BCHW = feature_BCHW.to(torch.promote_types(feature_BCHW.dtype, torch.float32))
    patch, stride, dim, width = config.patch, config.stride, config.level_dim, feature_BCHW.shape[1]
    if config.form == "released" and dim is not None and width % dim and patch > 1:
        height = (feature_BCHW.shape[2] - 1) // stride + 1
        # Images are handled one at a time, because unfolded maps are p * p times larger.
        # A graph for any number of images cannot have such a loop.
        images = [feature_BCHW] if torch.compiler.is_compiling() else feature_BCHW.split(1)
        unfolded = (F.unfold(some, patch, padding=patch // 2, stride=stride) for some in images)
        return torch.cat([pool_channels(some.unflatten(2, (height, -1)), dim) for some in unfolded])
    if patch > 1:
        feature_BCHW = F.avg_pool2d(feature_BCHW, patch, stride=stride, padding=patch // 2)
    elif stride > 1:
        feature_BCHW = feature_BCHW[:, :, ::stride, ::stride]
    return feature_BCHW if dim is None else pool_channels(feature_BCHW, dim)


def pool_channels(feature_BCHW: Tensor, dim: int) -> Tensor:
    """Pool channels by adaptive averaging (which repeats some if dim > C): [B, dim, H, W]. ValueError for dim < 1."""
    if dim < 1:
        raise ValueError(f"cannot pool {feature_BCHW.shape[1]} channels to {dim}: expected at least 1")
    if feature_BCHW.shape[1] == dim:
        return feature_BCHW
    height, width = feature_BCHW.shape[2:]
    pooled = F.adaptive_avg_pool2d(feature_BCHW.flatten(2)[:, None], (dim, height * width))
    return pooled[:, 0].unflatten(2, (height, width))


def on_one_grid(levels: FeatureMaps, size: tuple[int, int] | None = None) -> Tensor:
    """Resize levels bilinearly to a grid, the largest among them by default, and concatenate them: [B, C, H, W]."""
    if size is None:
        largest = max(levels, key=lambda level: level.shape[2] * level.shape[3])
        size = (int(largest.shape[2]), int(largest.shape[3]))
    same = [
        level if tuple(level.shape[2:]) == size else F.interpolate(level, size, mode="bilinear", align_corners=False)
        for level in levels
    ]
    return torch.cat(same, 1) if len(same) > 1 else same[0]


def random_reducer(width: int, dim: int, reduction: str, seed: int = 0) -> Tensor:
    """Draw the indices or the matrix of a random reduction of ``width`` channels to ``dim``, from the seed alone.

    "choose": [dim] ascending channel numbers; "project": Gaussian [width, dim] with entries of variance 1 / dim, which
    keeps squared distances in expectation; "orthogonal": [width, dim] with orthonormal columns. Raises ValueError if
    ``dim`` is larger than ``width``, or below 1.
    """
    if not 1 <= dim <= width:
        found = f"exceeds the {width} channels of the features" if dim > width else "keeps no channel"
        raise ValueError(f"target_dim {dim} {found}; choose 1 to {width}")
    generator = torch.Generator().manual_seed(seed)
    if reduction == "choose":
        return torch.randperm(width, generator=generator)[:dim].sort().values
    matrix = torch.randn(width, dim, generator=generator, dtype=torch.float64)
    if reduction == "project":
        return (matrix / dim**0.5).float()
    basis, triangle = torch.linalg.qr(matrix)
    # The matrix from QR is stored by columns and a loaded one by rows, and their products differ in the last bits.
    return (basis * triangle.diagonal().sign()).float().contiguous()
