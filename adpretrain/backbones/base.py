"""The nouns every backbone shares.

Shapes: B images, L levels, C_l channels, H_l x W_l tokens, S input side; R = 1 (references shared by the batch)
or B (references per image), N_l reference tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from adpretrain.preprocess import Preprocess

FeatureMaps = list[Tensor]  # L levels, each [B, C_l, H_l, W_l]
References = list[Tensor]  # L levels, each [R, N_l, C_l]
Extract = Callable[[Tensor], FeatureMaps]  # images [B, 3, S, S], already normalised


class Backbone(nn.Module):
    """A frozen multi-level feature network: an `Extract` that knows its name, widths and preprocessing.

    ``channels`` lists C_l per level; ``preprocess`` turns a photograph into the input it was trained for.
    Subclasses implement ``forward(images) -> FeatureMaps``. It never trains: `train` keeps evaluation mode.
    """

    def __init__(self, name: str, channels: Sequence[int], preprocess: Preprocess) -> None:
        super().__init__()
        self.name = name
        self.channels = list(channels)
        self.preprocess = preprocess
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        return super().train(False)
