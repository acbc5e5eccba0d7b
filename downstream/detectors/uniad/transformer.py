"""The transformer that reconstructs features from all but their own neighbourhood (UniAD, You et al. 2022).

Its three safeguards against copying its input: no token sees its neighbours, or itself, in any attention; every layer
of the decoder starts from queries of its own, which are learnt and know nothing of the image; and the training adds
noise to the input (`downstream.detectors.uniad`).

Shapes: B images, G x G grid of T = G^2 tokens, C channels inside the network, D channels of a feature.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def far_apart(grid: int, neighbours: int, device: torch.device | None = None) -> Tensor:
    """Which tokens see each other: all but those of the square of ``neighbours`` tokens around each, bool [T, T]."""
    number = torch.arange(grid * grid, device=device)
    row, column = number // grid, number % grid
    apart = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())
    return apart > neighbours // 2


class Attention(nn.Module):
    """Multi-head attention among the tokens that see each other; a token that sees none gets a constant."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.drop = nn.Dropout(dropout)

    def forward(self, query_BTC: Tensor, key_BTC: Tensor, value_BTC: Tensor, seen_BTT: Tensor) -> Tensor:
        """``seen_BTT`` [B or 1, T, T]: whether a query, of the second dimension, sees a key. Returns [B, T, C]."""
        layers = ((self.query, query_BTC), (self.key, key_BTC), (self.value, value_BTC))
        query, key, value = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer, x in layers)
        match = query @ key.mT * query.shape[-1] ** -0.5
        seen = seen_BTT[:, None]
        # The lowest number and a product, as a row of -inf would give NaN, also in its gradient.
        weight = match.masked_fill(~seen, torch.finfo(match.dtype).min).softmax(-1) * seen
        mixed = self.drop(weight).to(value.dtype) @ value
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    """Two linear layers, token by token."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__(nn.Linear(width, inner), nn.ReLU(), nn.Dropout(dropout), nn.Linear(inner, width))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network; each is added to its input, then normalised."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.inner = FeedForward(width, inner, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BTC: Tensor, place_TC: Tensor, seen_BTT: Tensor) -> Tensor:
        at = x_BTC + place_TC
        x_BTC = self.norms[0](x_BTC + self.drop(self.attention(at, at, x_BTC, seen_BTT)))
        return self.norms[1](x_BTC + self.drop(self.inner(x_BTC)))


class DecoderLayer(nn.Module):
    """The layer's own queries attend to the encoder's output, then to that of the layer before."""

    def __init__(self, tokens: int, width: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.queries = nn.Embedding(tokens, width)
        self.to_encoder, self.to_before = Attention(width, heads, dropout), Attention(width, heads, dropout)
        self.inner = FeedForward(width, inner, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.drop = nn.Dropout(dropout)

    def forward(self, before_BTC: Tensor, encoded_BTC: Tensor, place_TC: Tensor, seen_BTT: Tensor) -> Tensor:
        x_BTC = self.queries.weight.expand(encoded_BTC.shape[0], -1, -1)
        found = self.to_encoder(x_BTC + place_TC, encoded_BTC + place_TC, encoded_BTC, seen_BTT)
        x_BTC = self.norms[0](x_BTC + self.drop(found))
        found = self.to_before(x_BTC + place_TC, before_BTC + place_TC, before_BTC, seen_BTT)
        x_BTC = self.norms[1](x_BTC + self.drop(found))
        return self.norms[2](x_BTC + self.drop(self.inner(x_BTC)))


class Transformer(nn.Module):
    """Features of a grid -> what the rest of the image says that they are, [B, T, D] -> [B, T, D]."""

    def __init__(
        self, channels: int, grid: int, neighbours: int, width: int, heads: int, layers: int, inner: int, dropout: float
    ) -> None:
        super().__init__()
        self.channels, self.grid, self.neighbours = channels, grid, neighbours
        self.enter, self.leave = nn.Linear(channels, width), nn.Linear(width, channels)
        self.rows, self.columns = nn.Embedding(grid, width // 2), nn.Embedding(grid, width // 2)
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, inner, dropout) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(grid**2, width, heads, inner, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for place in (self.rows, self.columns):
            nn.init.uniform_(place.weight)

    def forward(self, tokens_BTD: Tensor, inside_BT: Tensor | None = None) -> Tensor:
        """``inside_BT``: the tokens in the region of interest, which alone are seen."""
        seen_BTT = far_apart(self.grid, self.neighbours, tokens_BTD.device)[None]
        if inside_BT is not None:
            seen_BTT = seen_BTT & inside_BT[:, None]
        columns, rows = self.columns.weight[None], self.rows.weight[:, None]
        halves = columns.expand(self.grid, -1, -1), rows.expand(-1, self.grid, -1)
        place_TC = torch.cat(halves, 2).flatten(0, 1)
        encoded_BTC = self.enter(tokens_BTD)
        for layer in self.encoder:
            encoded_BTC = layer(encoded_BTC, place_TC, seen_BTT)
        x_BTC = encoded_BTC
        for layer in self.decoder:
            x_BTC = layer(x_BTC, encoded_BTC, place_TC, seen_BTT)
        return self.leave(self.norm(x_BTC))
