"""A projector checkpoint under the names and shapes of the authors' release, with random weights."""

from __future__ import annotations

import torch
from torch import Tensor


def released_state(
    width: int, levels: int, references: int = 16, hidden: int = 0, reduced: int = 0, scale: float = 0.1
) -> dict[str, Tensor]:
    """``hidden`` (0 = width) and ``reduced`` (0 = width / 16, at least 8): channels of the perceptron and its gate."""
    generator = torch.Generator().manual_seed(0)
    hidden = hidden or width
    reduced = reduced or max(8, width // 16)
    shapes = {
        "x_ref": (1, references, width),
        "ref_proj.project.weight": (width, width, 1),
        "ref_proj.project.bias": (width,),
        "layers.0.cross_attn.in_proj_weight": (3 * width, width),
        "layers.0.cross_attn.in_proj_bias": (3 * width,),
        "layers.0.cross_attn.out_proj.weight": (width, width),
        "layers.0.cross_attn.out_proj.bias": (width,),
        "layers.0.mlp.fc1.weight": (hidden, width),
        "layers.0.mlp.fc1.bias": (hidden,),
        "layers.0.mlp.fc2.weight": (width, hidden),
        "layers.0.mlp.fc2.bias": (width,),
        "layers.0.mlp.se.fc1.weight": (reduced, hidden),
        "layers.0.mlp.se.fc1.bias": (reduced,),
        "layers.0.mlp.se.fc2.weight": (hidden, reduced),
        "layers.0.mlp.se.fc2.bias": (hidden,),
    }
    return {
        f"l{level}_proj.{name}": torch.randn(shape, generator=generator) * scale
        for level in range(1, levels + 1)
        for name, shape in shapes.items()
    }
