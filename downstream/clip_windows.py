"""A CLIP model as WinCLIP sees it: the whole image, windows of it, its patches, and sentences (Jeong et al. 2023).

Shapes: B images, S side in pixels, H x W patches (T in all), D channels of the space that images and sentences share,
C channels of the tower, s side of a window in patches, h x w = (H - s + 1) x (W - s + 1) windows (n in all).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adpretrain.backbones import FeatureMaps
from adpretrain.extras import need
from adpretrain.preprocess import CLIP_MEAN, CLIP_STD, Preprocess

AT_A_TIME = 64  # sentences, or windows of each image of a batch


class ClipWindows(nn.Module):
    """An `Extract` of an open_clip ``model`` with a vision transformer: [B, 3, S, S] -> the levels whole [B, D, 1, 1],
    one of windows [B, D, h, w] for each of ``scales``, and patches [B, C, H, W].

    A window is the class token and the tokens of its patches, with the positions that they have in the image, sent
    through the transformer alone; so a window sees nothing else. The n windows of a scale take about s * s / 1 of the
    time of the image for each of its patches: 13 times in all for the paper's 2 and 3.

    Raises ValueError for a model whose tower is none, or that pools otherwise than by its class token.
    """

    def __init__(self, model: Any, scales: Sequence[int] = (2, 3)) -> None:
        super().__init__()
        need("clip", "open_clip")
        visual: Any = getattr(model, "visual", None)
        if not hasattr(visual, "grid_size") or getattr(visual, "attn_pool", 0) is not None or visual.pool_type != "tok":
            raise ValueError(
                f"WinCLIP needs an open_clip model with a vision transformer and a class token, such as "
                f"ViT-B-16-plus-240, not a {type(model).__name__}"
            )
        grid = visual.grid_size
        if not scales or not all(1 <= scale <= min(grid) for scale in scales):
            raise ValueError(f"scales {list(scales)} must be sides of windows in patches, 1 to {min(grid)}")
        self.model, self.scales, self.grid = model, tuple(scales), grid
        mean, std = (getattr(visual, f"image_{name}", None) for name in ("mean", "std"))
        self.preprocess = Preprocess(visual.image_size[0], mean=mean or CLIP_MEAN, std=std or CLIP_STD)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> FeatureMaps:
        """Extract the levels. Raises ValueError for images of another size than the model's."""
        if images.shape[2] != self.preprocess.image_size:
            raise ValueError(f"expected images of {self.preprocess.image_size} pixels, got {tuple(images.shape)}")
        visual = self.model.visual
        tokens_BTC = visual._embeds(images)
        whole_BD, patches_BTC = self._seen(tokens_BTC)
        windows = []
        for scale in self.scales:
            numbers_ns = self._windows(scale).to(images.device)
            shape = (self.grid[0] - scale + 1, self.grid[1] - scale + 1)
            parts = [numbers_ns] if torch.compiler.is_compiling() else numbers_ns.split(AT_A_TIME)
            seen = [self._seen(tokens_BTC[:, part].flatten(0, 1))[0].unflatten(0, (-1, len(part))) for part in parts]
            windows.append(torch.cat(seen, 1).mT.unflatten(2, shape))
        return [whole_BD[:, :, None, None], *windows, patches_BTC.mT.unflatten(2, self.grid)]

    def _seen(self, tokens_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """What the tower makes of tokens: its output [B, D], and its patches [B, T, C]."""
        visual = self.model.visual
        pooled_BC, patches_BTC = visual._pool(visual.transformer(tokens_BTC))
        return pooled_BC if visual.proj is None else pooled_BC @ visual.proj, patches_BTC

    def _windows(self, scale: int) -> Tensor:
        """The numbers of the tokens of every window, the class token first: [n, 1 + s * s]."""
        numbers = torch.arange(1, 1 + self.grid[0] * self.grid[1]).view(self.grid)
        patches_ns = numbers.unfold(0, scale, 1).unfold(1, scale, 1).reshape(-1, scale * scale)
        return F.pad(patches_ns, (1, 0))

    @torch.no_grad()
    def meaning(self, sentences: Sequence[str]) -> Tensor:
        """The mean of the encoded sentences, of unit length: [D]."""
        from open_clip import tokenize  # type: ignore[import-untyped]

        tokens = tokenize(list(sentences)).to(next(self.parameters()).device)
        encoded = torch.cat([self.model.encode_text(some) for some in tokens.split(AT_A_TIME)])
        return F.normalize(encoded.float().mean(0), dim=0)
