"""A vision transformer written from the papers with nothing but matrix products, in float64: the independent reference.

Shapes: B images, T tokens (class token first), C channels, M and G grid sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn


@dataclass(frozen=True)
class Block:
    """The tensors of one pre-norm block; ``mlp`` maps the normalised tokens, ``scale1/2`` are layer scales."""

    norm1: tuple[Tensor, Tensor]
    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    norm2: tuple[Tensor, Tensor]
    mlp: Callable[[Tensor], Tensor]
    scale1: Tensor | float = 1.0
    scale2: Tensor | float = 1.0


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def two_layers(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], activation: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(activation(F.linear(x, *first)), *second)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias


def attention(
    x: Tensor,
    qkv: tuple[Tensor, Tensor],
    out: tuple[Tensor, Tensor],
    heads: int,
    turn: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``turn`` gives the queries and keys [B, T, C / heads] of every head their rotary positions."""
    query, key, value = F.linear(x, *qkv).chunk(3, -1)
    size = x.shape[-1] // heads
    parts = []
    for head in range(heads):
        q, k, v = (t[..., head * size : (head + 1) * size] for t in (query, key, value))
        q, k = (turn(q), turn(k)) if turn else (q, k)
        parts.append(torch.softmax(q @ k.transpose(1, 2) / math.sqrt(size), -1) @ v)
    return F.linear(torch.cat(parts, -1), *out)


def block_outputs(
    tokens: Tensor, blocks: list[Block], heads: int, eps: float, turn: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """[B, T, C] after the embedding -> the outputs of every block as maps [B, C, G, G], class token dropped."""
    maps = []
    for block in blocks:
        mixed = attention(layer_norm(tokens, *block.norm1, eps), block.qkv, block.out, heads, turn)
        tokens = tokens + block.scale1 * mixed
        tokens = tokens + block.scale2 * block.mlp(layer_norm(tokens, *block.norm2, eps))
        side = math.isqrt(tokens.shape[1] - 1)
        maps.append(tokens[:, 1:].reshape(-1, side, side, tokens.shape[2]).permute(0, 3, 1, 2))
    return maps


def bicubic(grid_MMC: Tensor, side: int, scale: float) -> Tensor:
    """[M, M, C] -> [side, side, C]: Keys' cubic kernel (a = -0.75), pixel centres at (i + 0.5) / scale, edges held."""
    size = grid_MMC.shape[0]

    def kernel(t: float) -> float:
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    matrix = np.zeros((side, size))
    for target in range(side):
        place = (target + 0.5) / scale - 0.5
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            matrix[target, min(max(tap, 0), size - 1)] += kernel(place - tap)
    weights = torch.from_numpy(matrix).to(grid_MMC.dtype)
    return torch.einsum("ai,bj,ijc->abc", weights, weights, grid_MMC)


def bilinear(grid_MMC: Tensor, side: int, corners: bool = False) -> Tensor:
    """[M, M, C] -> [side, side, C]: linear between neighbours. Pixel centres at (i + 0.5) M / side, edges held; or with
    ``corners`` at i (M - 1) / (side - 1), so that the corners stay where they are."""
    size = grid_MMC.shape[0]
    matrix = torch.zeros(side, size, dtype=grid_MMC.dtype)
    for target in range(side):
        place = target * (size - 1) / (side - 1) if corners else (target + 0.5) * size / side - 0.5
        place = min(max(place, 0.0), size - 1.0)
        left = min(int(place), size - 2)
        matrix[target, left] += 1 - (place - left)
        matrix[target, left + 1] += place - left
    return torch.einsum("ai,bj,ijc->abc", matrix, matrix, grid_MMC)


def pillow_bicubic(grid_MMC: Tensor, side: int) -> Tensor:
    """[M, M, C] -> [side, side, C] by Pillow's antialiased bicubic resize of every channel."""
    channels = [Image.fromarray(channel.numpy().astype(np.float32)) for channel in grid_MMC.permute(2, 0, 1)]
    resized = [np.asarray(channel.resize((side, side), Image.Resampling.BICUBIC)) for channel in channels]
    return torch.from_numpy(np.stack(resized, -1)).to(grid_MMC.dtype)


def with_class_token(positions_PC: Tensor, resize: Callable[[Tensor], Tensor]) -> Tensor:
    """[1 + M * M, C] -> [1 + G * G, C]."""
    side = math.isqrt(positions_PC.shape[0] - 1)
    grid = resize(positions_PC[1:].reshape(side, side, -1))
    return torch.cat([positions_PC[:1], grid.reshape(-1, grid.shape[-1])])


def lively(network: nn.Module, seed: int = 0, spread: float | None = None) -> nn.Module:
    """Random weights in which every tensor matters: no zeros, no ones, no tiny layer scales.

    ``spread``: deviation of the weights; None = sqrt(2 / fan-in), which keeps the scale through many ReLUs.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim <= 1 and name.endswith(("weight", "running_var")):  # of a norm
                value.copy_(1 + 0.2 * noise.clamp(-3, 3))
            else:
                fan_in = value[0].numel() if value.ndim > 1 else 100
                value.copy_(noise * (spread or (2 / fan_in) ** 0.5))
    return network.eval()


def images(side: int, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def error(ours: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference of a level, ||ours - expected|| / ||expected||."""
    assert [level.shape for level in ours] == [level.shape for level in expected]
    return max(
        float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, map(Tensor.double, expected), strict=True)
    )


def hooked(network: nn.Module, modules: list[nn.Module], run: Callable[[], object]) -> list[Tensor]:
    """What the modules put out while ``run`` runs."""
    seen: dict[int, Tensor] = {}
    handles = [
        module.register_forward_hook(
            lambda _, __, output, at=at: seen.__setitem__(at, output[0] if isinstance(output, tuple) else output)
        )
        for at, module in enumerate(modules)
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return [seen[at] for at in range(len(modules))]


def as_maps(tokens: list[Tensor]) -> list[Tensor]:
    """Block outputs [B, 1 + G * G, C] -> [B, C, G, G]."""
    side = math.isqrt(tokens[0].shape[1] - 1)
    return [level[:, 1:].reshape(-1, side, side, level.shape[2]).permute(0, 3, 1, 2) for level in tokens]
