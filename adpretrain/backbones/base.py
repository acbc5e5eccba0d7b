"""The base class of all backbones, their types and checks, and the resizing of position embeddings.

Shapes: B images, L levels, C_l channels, H_l x W_l tokens, S input side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adpretrain.preprocess import Preprocess

FeatureMaps = list[Tensor]  # L levels, each [B, C_l, H_l, W_l]
Extract = Callable[[Tensor], FeatureMaps]  # images [B, 3, S, S], already normalised


class Backbone(nn.Module):
    """A frozen multi-level feature network: an `Extract` that knows where its features come from.

    Args:
        name: the name that `load_backbone` takes.
        channels: C_l per level.
        preprocess: turns a photograph into the input the network was trained for; fixes S.
        levels: numbers of the blocks or stages that give the levels, from 1.
        network: the module that computes them; None if the subclass needs none.
        revision: commit of the weights on the Hugging Face Hub; None if they come from elsewhere.

    Subclasses implement ``maps(images) -> FeatureMaps``. A backbone does not train: no parameter requires a gradient,
    `forward` records none, and `train` keeps evaluation mode. `unfreeze` is for the ablation that trains it.
    """

    def __init__(
        self,
        name: str,
        channels: Sequence[int],
        preprocess: Preprocess,
        levels: Sequence[int],
        network: nn.Module | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.channels = list(channels)
        self.preprocess = preprocess
        self.levels = list(levels)
        self.revision = revision
        self.image_size = preprocess.image_size
        self.network = network
        self.finest, self.patch = 0, [1] * len(self.levels)  # see `load_backbone`
        self.frozen = True
        self.requires_grad_(False)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and of the features whatever the input's dtype or the autocast state."""
        return next(self.parameters()).dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype to which images are converted: that of the weights unless a subclass overrides it."""
        return self.dtype

    def train(self, mode: bool = True) -> Backbone:
        return super().train(False)

    def unfreeze(self) -> None:
        """Let `forward` record gradients where its caller does; evaluation mode stays (no dropout, and the statistics
        of batch norms are kept)."""
        self.frozen = False
        self.requires_grad_(True)

    def forward(self, images: Tensor) -> FeatureMaps:
        """[B, 3, S, S], normalised by ``preprocess`` -> L levels [B, C_l, H_l, W_l] in the backbone's dtype.

        Raises ValueError for an empty batch, images of another size than the backbone's, or an integer dtype.
        """
        side = self.image_size
        fitting = images.ndim == 4 and images.shape[0] > 0 and images.shape[1:] == (3, side, side)
        if not fitting or not images.is_floating_point():
            raise ValueError(
                f"this {self.name} takes images [B, 3, {side}, {side}] of floats with B > 0, got "
                f"{tuple(images.shape)} of {images.dtype}: prepare them with .preprocess, or choose another image_size"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.maps(images.to(self.compute_dtype))
            return [self._averaged(level, side).to(self.dtype) for level, side in zip(maps, self.patch, strict=True)]

    def _averaged(self, level: Tensor, side: int) -> Tensor:
        """The map, averaged down to stride ``finest`` if it is finer, and then over ``side`` x ``side`` tokens."""
        if self.finest and level.shape[2] * self.finest > self.image_size:
            level = F.adaptive_avg_pool2d(level, self.image_size // self.finest)
        return level if side == 1 else F.avg_pool2d(level, side, stride=1, padding=side // 2)

    def maps(self, images: Tensor) -> FeatureMaps:
        """[B, 3, S, S] of ``compute_dtype`` -> L levels [B, C_l, H_l, W_l]."""
        raise NotImplementedError


def token_map(tokens_BTC: Tensor) -> Tensor:
    """The T = G * G tokens of a square grid, row by row: [B, T, C] -> [B, C, G, G]."""
    side = round(tokens_BTC.shape[1] ** 0.5)
    return tokens_BTC.transpose(1, 2).unflatten(2, (side, side))


def check_levels(name: str, levels: Sequence[int], count: int, what: str) -> list[int]:
    """``levels`` as a list if they are some of 1..count in increasing order; ValueError naming the valid ones."""
    chosen = list(levels)
    valid = range(1, count + 1)
    if (
        not chosen
        or any(type(level) is not int or level not in valid for level in chosen)
        or chosen != sorted({*chosen})
    ):
        raise ValueError(
            f"levels {chosen} do not fit {name}: list some of its {what} {', '.join(map(str, valid))}, "
            "in increasing order, each once"
        )
    return chosen


def check_image_size(name: str, image_size: int, step: int, what: str) -> None:
    """ValueError naming the nearest valid sizes unless ``image_size`` is a positive multiple of ``step``."""
    if image_size < step or image_size % step:
        below = image_size // step * step
        nearest = f"{below} or {below + step}" if below > 0 else str(step)
        raise ValueError(
            f"{name} needs an image_size that is a multiple of {what} ({step} pixels), got {image_size}: "
            f"choose {nearest}"
        )


def resize_positions(
    positions_PC: Tensor, grid: int, offset: float = 0.0, antialias: bool = False, mode: str = "bicubic"
) -> Tensor:
    """[M * M, C] -> [grid * grid, C] by interpolation in float32; a class token before the grid stays before it.

    Unchanged if M == grid. Families resize their grids in different ways, which changes block features by some per
    cent: DINOv2 scales by (grid + 0.1) / M (``offset`` 0.1), which samples slightly other places than
    the plain grid / M of ImageBind; open_clip antialiases; the Perception Encoder's ``mode`` is "bilinear".

    Raises ValueError if the tokens do not make a square.
    """
    side = math.isqrt(positions_PC.shape[0])
    first = positions_PC.shape[0] - side * side
    if positions_PC.ndim != 2 or side == 0 or first > 1:
        raise ValueError(
            f"position embeddings of shape {list(positions_PC.shape)} are not a square grid, with or without one class "
            "token before it"
        )
    if side == grid:
        return positions_PC
    old = positions_PC[first:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if offset:
        scale = (grid + offset) / side
        new = F.interpolate(old, scale_factor=(scale, scale), mode=mode, align_corners=False)
    else:
        new = F.interpolate(old, size=(grid, grid), mode=mode, align_corners=False, antialias=antialias)
    assert new.shape[2:] == (grid, grid)
    return torch.cat([positions_PC[:first], new[0].flatten(1).T.to(positions_PC.dtype)])
