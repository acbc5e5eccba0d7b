"""The domain-specific encoder of ReContrast: a copy of the detector's backbone that is trained.

Shapes: B images, S side in pixels, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adpretrain.backbones import Backbone, Extract
from downstream.embedding import chosen_levels
from downstream.extracts import fixed_picture

LEAST_VARIANCE = 5e-4  # App. E


class GuardedNorm(nn.Module):
    """A batch norm that survives channels which never change on one product (App. E): a batch variance below
    min(5e-4, running variance) is replaced by the running one, which therefore stays that of pretraining."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x_BCHW: Tensor) -> Tensor:
        norm = self.norm
        if not self.training:
            return norm(x_BCHW)
        assert norm.running_var is not None
        assert norm.running_mean is not None
        x = x_BCHW.float()
        variance_C, mean_C = torch.var_mean(x, (0, 2, 3), correction=0)
        guarded_C = variance_C < norm.running_var.clamp_max(LEAST_VARIANCE)
        variance_C = torch.where(guarded_C, norm.running_var, variance_C)
        with torch.no_grad():
            momentum, count = norm.momentum or 0.0, x.numel() // x.shape[1]
            unbiased_C = torch.where(guarded_C, variance_C, variance_C * (count / max(1, count - 1)))
            norm.running_mean.lerp_(mean_C, momentum)
            norm.running_var.lerp_(unbiased_C, momentum)
        scale_C = norm.weight * (variance_C + norm.eps).rsqrt()
        y = ((x - mean_C[:, None, None]) * scale_C[:, None, None] + norm.bias[:, None, None]).to(x_BCHW.dtype)
        for name in ("drop", "act"):  # timm's norms have their activation inside
            y = getattr(norm, name, nn.Identity())(y)
        return y


def check_trainable(extract: Extract, form: str) -> None:
    """Raise ValueError unless a copy of the extract can be trained."""
    if isinstance(extract, Backbone):
        return
    raise ValueError(
        f"form {form!r} trains a copy of the encoder and takes a raw Backbone, got a {type(extract).__name__}: give "
        'load_backbone(...) or an extractor\'s .backbone, or choose form "B" (rd4ad), which trains the decoder only'
    )


def trainable_copy(backbone: Backbone, levels: Sequence[int] | None, guarded: bool) -> Backbone:
    """A copy in float32 whose weights that the chosen levels depend on require gradients, in evaluation mode.

    ``guarded``: its batch norms are `GuardedNorm`s.
    """
    copied = copy.deepcopy(backbone).float()
    copied.unfreeze()
    weights = list(copied.parameters())
    picture = fixed_picture(copied.image_size, weights[0].device)
    with torch.enable_grad():  # those of later stages would have no gradient, which several processes cannot reduce
        found = sum(level.sum() for level in chosen_levels(copied(picture), levels))
        assert isinstance(found, Tensor)
        gradients = torch.autograd.grad(found, weights, allow_unused=True)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.requires_grad_(gradient is not None)
    if guarded:
        for module in list(copied.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, GuardedNorm(child))
    return copied.eval()


def set_norms(encoder: Backbone, training: bool) -> None:
    """Let the batch norms of an encoder use the statistics of the batch, or those that it has kept."""
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d | GuardedNorm):
            module.train(training)
