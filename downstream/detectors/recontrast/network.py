"""The bottleneck and the reversed decoder of RD4AD (Deng & Li 2022), for features of any channels.

Bottleneck: convolutions of stride 2 bring every level to the size of the coarsest; the levels are concatenated, and
residual blocks like those of a further stage of the encoder halve the size and double the coarsest level's channels.
Decoder: the stages of the encoder in reverse order, the convolution of stride 2 at the beginning of each replaced by a
2 x 2 transposed convolution of stride 2.

Released code gives its decoder's outputs directly. They are not negative, as the features of a ResNet are; ReContrast
projects them with 1 x 1 convolutions, and we do so for RD4AD, too, because other networks' features may be negative.

Shapes: B images, L levels, finest first, C_l channels of a level, each half as large as the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from adpretrain.backbones import FeatureMaps

WIDE = 256  # channels of the finest level from which blocks are bottlenecks, as in ResNet-50
DEPTHS = {False: (2, 2, 2, 2), True: (3, 3, 4, 6)}  # blocks: bottleneck, then decoder from the coarsest; ResNet-18, -50


class Residual(nn.Module):
    """A residual block: two 3 x 3 convolutions or, with a ``divisor``, 1 x 1, 3 x 3, 1 x 1 with out / divisor channels
    in between. ``step`` "down" halves the size, "up" doubles it, "same" keeps it."""

    def __init__(self, channels: int, out: int, step: str, divisor: int) -> None:
        super().__init__()
        if divisor:
            width = max(1, out // divisor)
            inner = [_norm(_plain(channels, width)), nn.ReLU(), _norm(_moving(width, width, step)), nn.ReLU()]
            last = _plain(width, out)
        else:
            inner, last = [_norm(_moving(channels, out, step)), nn.ReLU()], nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.main = nn.Sequential(*inner, _norm(last))
        same = step == "same" and channels == out
        self.side = nn.Identity() if same else _norm(_direct(channels, out, step))

    def forward(self, x: Tensor) -> Tensor:
        return (self.main(x) + self.side(x)).relu()


def _norm(layer: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
    return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels))


def _plain(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 1, bias=False)


def _moving(channels: int, out: int, step: str) -> nn.Conv2d | nn.ConvTranspose2d:
    if step == "up":
        return nn.ConvTranspose2d(channels, out, 2, 2, bias=False)
    return nn.Conv2d(channels, out, 3, 2 if step == "down" else 1, 1, bias=False)


def _direct(channels: int, out: int, step: str) -> nn.Conv2d | nn.ConvTranspose2d:
    if step == "up":
        return nn.ConvTranspose2d(channels, out, 2, 2, bias=False)
    return nn.Conv2d(channels, out, 1, 2 if step == "down" else 1, bias=False)


def _stage(channels: int, out: int, step: str, depth: int, divisor: int) -> nn.Sequential:
    first = Residual(channels, out, step, divisor)
    return nn.Sequential(first, *(Residual(out, out, "same", divisor) for _ in range(depth - 1)))


class Bottleneck(nn.Module):
    """L levels -> one code [B, 2 C_L, H_L / 2, W_L / 2]."""

    def __init__(self, channels: Sequence[int], divisor: int, depth: int) -> None:
        super().__init__()
        self.shrink = nn.ModuleList(_shrinking(channels[level:]) for level in range(len(channels)))
        self.code = _stage(len(channels) * channels[-1], 2 * channels[-1], "down", depth, divisor)

    def forward(self, levels: FeatureMaps) -> Tensor:
        return self.code(torch.cat([shrink(level) for shrink, level in zip(self.shrink, levels, strict=True)], 1))


def _shrinking(channels: Sequence[int]) -> nn.Sequential:
    return nn.Sequential(*(layer for a, b in pairwise(channels) for layer in (_norm(_moving(a, b, "down")), nn.ReLU())))


class Reversed(nn.Module):
    """L levels of features -> their reconstruction, for each of several ``views`` with 1 x 1 convolutions of its own.

    ``divisor`` is that of the residual blocks; None = 2, as in WideResNet-50, where level 1 has at least 256 channels,
    else 0: blocks as in ResNet-18.
    """

    def __init__(self, channels: Sequence[int], views: int, divisor: int | None = None) -> None:
        super().__init__()
        divisor = (2 if channels[0] >= WIDE else 0) if divisor is None else divisor
        code, *depths = DEPTHS[divisor > 0]
        coarse_first = [2 * channels[-1], *reversed(channels)]
        depths += [depths[-1]] * len(channels)
        self.bottleneck = Bottleneck(channels, divisor, code)
        self.decoder = nn.ModuleList(
            _stage(a, b, "up", depth, divisor)
            for a, b, depth in zip(coarse_first[:-1], coarse_first[1:], depths[: len(channels)], strict=True)
        )
        self.heads = nn.ModuleList(nn.ModuleList(nn.Conv2d(c, c, 1) for c in channels) for _ in range(views))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def decode(self, levels: FeatureMaps) -> FeatureMaps:
        """The decoder's outputs before the projections, finest level first."""
        x = self.bottleneck(levels)
        found = []
        for stage in self.decoder:
            x = stage(x)
            found.append(x)
        return found[::-1]

    def forward(self, views: Sequence[FeatureMaps]) -> list[FeatureMaps]:
        """Features of each view -> what is reconstructed from them by the projections of that view. All views go
        through the network as one batch, so that its batch norms see them together."""
        decoded = self.decode([torch.cat(level) for level in zip(*views, strict=True)])
        parts = zip(*(level.unflatten(0, (len(views), -1)) for level in decoded), strict=True)
        return [
            [head(level) for head, level in zip(heads, part, strict=True)]  # type: ignore[call-overload]
            for heads, part in zip(self.heads, parts, strict=True)
        ]


def check_pyramid(levels: FeatureMaps) -> None:
    """Raise ValueError unless each level is half as large as the one before, and the last can be halved, too."""
    sizes = [tuple(level.shape[2:]) for level in levels]
    halves = all(a == (2 * b[0], 2 * b[1]) for a, b in pairwise(sizes))
    if halves and all(side % 2 == 0 for side in sizes[-1]):
        return
    found = ", ".join(f"{height} x {width}" for height, width in sizes)
    raise ValueError(
        f"levels of {found} do not make a pyramid: each must be twice as large as the next, and the last have an even "
        "size. Choose levels whose strides double (such as 1 to 3 of a ResNet or of lite0) and an image_size that is a "
        "multiple of twice the coarsest stride; for the equal levels of a vision transformer there is dinomaly"
    )
