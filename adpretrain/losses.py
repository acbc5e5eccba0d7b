"""Angle- and norm-oriented contrastive losses (ADPretrain Sec. 3.2).

Shapes: N tokens of one view (all images of the batch, one level), D channels; i' is token i in the second view.
``anomalous_N`` is bool (or 0/1), True where the token's label m_i = 1. If it is on the host while the features are on a
device, no step waits for the device, because the numbers of tokens are known on the host.

With several processes (``group``, see `adpretrain.training.distributed`), the batch is that of all of them: each loss
is this process's share, and the shares and their gradients sum to those of the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adpretrain.device import upload
from adpretrain.training.distributed import Group, everyone, gather_rows, log_sum_exp, smallest, total

FORMS = ("paper", "released")
CHUNK_BYTES = 64 << 20  # the largest [normal x anomalous] block of similarities held at once


def _check(form: str, features_ND: Tensor, anomalous_N: Tensor, group: Group) -> Tensor:
    if form not in FORMS:
        raise ValueError(f"loss form {form!r} is unknown; choose one of {FORMS}")
    if features_ND.ndim != 2 or anomalous_N.shape != features_ND.shape[:1]:
        raise ValueError(
            f"expected features [N, D] and labels [N], got {tuple(features_ND.shape)} and {tuple(anomalous_N.shape)}"
        )
    if group is None and not len(anomalous_N):  # one of several processes may have none
        raise ValueError(f"features {tuple(features_ND.shape)} hold no tokens; a loss is a mean over at least one")
    return anomalous_N.to(torch.bool)


class _OppositeLogSumExp(torch.autograd.Function):
    """log sum_j exp(s x_i.y_j) over rows and columns of one block, never holding more than a chunk of it.

    ``x`` [P, D], ``y`` [Q, D], ``scale`` s -> ([P], [Q]). The backward pass recomputes each chunk.
    """

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, y_QD: Tensor, scale: float, chunk_bytes: int) -> tuple[Tensor, Tensor]:
        rows = max(1, chunk_bytes // (y_QD.shape[0] * y_QD.element_size()))
        row_parts = []
        column_Q = y_QD.new_full((y_QD.shape[0],), -torch.inf)
        for part in x_PD.split(rows):
            logits = (part @ y_QD.T).mul_(scale)
            row_parts.append(logits.logsumexp(1))
            column_Q = torch.logaddexp(column_Q, logits.logsumexp(0))
        row_P = torch.cat(row_parts)
        ctx.save_for_backward(x_PD, y_QD, row_P, column_Q)
        ctx.scale, ctx.rows = scale, rows
        return row_P, column_Q

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_PD, y_QD, row_P, column_Q = ctx.saved_tensors
        grad_row_P, grad_column_Q = grads
        grad_x, grad_y = [], torch.zeros_like(y_QD)
        chunks = zip(x_PD.split(ctx.rows), row_P.split(ctx.rows), grad_row_P.split(ctx.rows), strict=True)
        for part, row, grad_row in chunks:
            logits = (part @ y_QD.T).mul_(ctx.scale)
            weight = (logits - row[:, None]).exp_().mul_(grad_row[:, None])
            weight += logits.sub_(column_Q).exp_().mul_(grad_column_Q)
            weight *= ctx.scale
            grad_x.append(weight @ y_QD)
            grad_y.addmm_(weight.T, part)
        return torch.cat(grad_x), grad_y, None, None


def angle_loss(
    features_ND: Tensor,
    augmented_ND: Tensor,
    anomalous_N: Tensor,
    center_D: Tensor,
    temperature: float = 0.15,
    form: str = "paper",
    chunk_bytes: int = CHUNK_BYTES,
    group: Group = None,
) -> Tensor:
    """Angle-oriented contrastive loss, mean over anchors (ADPretrain Eq. 2).

    With x_bar = (x - c) / ||x - c||, an anchor i has the positive i' (the same token in the other view) and as
    negatives all tokens of the opposite label in both views; the positive is not in the denominator, so the loss
    may be negative. ``form="paper"``: anchors are the tokens of the first view. ``form="released"``: anchors are
    the tokens of both views, as in the authors' code.

    Only normal x anomalous similarities are computed, in chunks; the 2N x 2N matrix of the formula never exists. With a
    ``group``, only the anomalous tokens, which are few, are sent: every process compares its own normal tokens with all
    anomalous ones, and the anomalous anchors' sums over normal tokens are added up over the processes.
    A batch without anomalous or without normal tokens has no negatives: its loss is 0 (with zero gradients).
    Raises ValueError for shapes that do not fit, no tokens, an unknown form or a temperature <= 0.
    """
    anomalous_N = _check(form, features_ND, anomalous_N, group)
    if augmented_ND.shape != features_ND.shape:
        raise ValueError(f"the views differ in shape: {tuple(features_ND.shape)} and {tuple(augmented_ND.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} must be positive")
    first = F.normalize(features_ND - center_D, dim=1)
    second = F.normalize(augmented_ND - center_D, dim=1)
    # Indices, not masks, which would wait for the device at every use: making them waits once (not with labels on the
    # host).
    normal, anomalous = (
        upload(marked_N.nonzero()[:, 0], features_ND.device) for marked_N in (~anomalous_N, anomalous_N)
    )
    counts = everyone([len(anomalous_N), len(anomalous)], group)
    tokens, negatives = (sum(count) for count in zip(*counts, strict=True))
    if not 0 < negatives < tokens:
        return (first.sum() + second.sum()) * 0.0
    rows_QD = torch.cat([first[anomalous], second[anomalous]])
    everywhere, own = gather_rows(rows_QD, [2 * count for _, count in counts], group)
    rows, columns = _OppositeLogSumExp.apply(
        torch.cat([first[normal], second[normal]]), everywhere, 1.0 / temperature, chunk_bytes
    )
    columns = log_sum_exp(columns, group)[own]
    positive = ((first * second).sum(1) / temperature).sum()
    if form == "paper":
        return (rows[: len(normal)].sum() + columns[: len(anomalous)].sum() - positive) / tokens
    return (rows.sum() + columns.sum()) / (2 * tokens) - positive / tokens


def pseudo_huber_norm(features_ND: Tensor) -> Tensor:
    """n_i = sqrt(||x_i||^2 + 1) - 1 (ADPretrain, before Eq. 3): [N].

    Written as q / (sqrt(q + 1) + 1) with q = ||x||^2, which keeps the digits of small norms.
    """
    squared = features_ND.square().sum(-1)
    return squared / ((squared + 1).sqrt() + 1)


def _contraction(excess_N: Tensor) -> Tensor:
    """-logsigmoid(-d) e^d (ADPretrain Eq. 3)."""
    return -F.logsigmoid(-excess_N) * excess_N.exp()


def norm_loss(
    features_ND: Tensor,
    anomalous_N: Tensor,
    radius: float = 0.4,
    margin: float = 0.75,
    form: str = "paper",
    group: Group = None,
) -> Tensor:
    """Norm-oriented contrastive loss (ADPretrain Eq. 3-6).

    ``form="paper"``: mean over tokens of -logsig(-d) e^d with d = n - r for normal tokens (Eq. 3) and d = r' - n,
    r' = r + margin, for anomalous tokens inside r' (Eq. 5), n the pseudo-Huber norm.

    ``form="released"``: what the authors' code computes: n = sqrt(||x|| + 1) - 1 (the norm is not squared), the
    radius adapts to the batch, normal tokens below .99 of it are pushed up too, the e^d weights are detached, and
    the means of the groups are added.

    Empty groups of tokens add nothing. Raises ValueError for shapes that do not fit, no tokens, an unknown form, or a
    radius or margin below 0.
    """
    anomalous_N = _check(form, features_ND, anomalous_N, group)
    if not (radius >= 0 and margin >= 0):
        raise ValueError(f"radius {radius} and margin {margin} must be at least 0: a norm is never below it")
    if form == "released":
        return _released_norm_loss(features_ND, upload(anomalous_N, features_ND.device), radius, margin, group)
    anomalous_N = upload(anomalous_N, features_ND.device)
    norm_N = pseudo_huber_norm(features_ND)
    tokens = total(norm_N.new_full((), len(norm_N)), group)
    # Where an anomalous token is already outside r' its term is 0; clamping d first keeps e^d finite there.
    gap_N = torch.where(anomalous_N, radius + margin - norm_N, norm_N - radius)
    active_N = ~anomalous_N | (gap_N >= 0)
    return (_contraction(gap_N.where(active_N, 0.0)) * active_N).sum() / tokens.clamp_min(1)


def _detached_contraction(excess_N: Tensor) -> Tensor:
    return -F.logsigmoid(-excess_N) * excess_N.detach().exp()


def _released_norm_loss(features_ND: Tensor, anomalous_N: Tensor, radius: float, margin: float, group: Group) -> Tensor:
    """It never waits for the device: the groups are masks, and their sizes are sums of masks."""
    norm_N = (features_ND.norm(dim=1) + 1).sqrt() - 1
    # Without anomalies the minimum is infinite, and the radius is the given one.
    nearest = F.pad(norm_N.detach().masked_fill(~anomalous_N, torch.inf), (0, 1), value=torch.inf).amin()
    outer = (0.9 * smallest(nearest, group)).clamp_max(radius)
    inner = 0.99 * outer
    groups = (
        (~anomalous_N, norm_N - outer),
        (~anomalous_N, inner - norm_N),
        (anomalous_N, outer + margin - norm_N),
    )
    active = torch.stack([labelled_N & (excess_N > 0) for labelled_N, excess_N in groups])
    counts = total(active.sum(1), group).clamp_min(1)
    sums = [
        (_detached_contraction(excess_N.where(active_N, 0.0)) * active_N).sum()
        for active_N, (_, excess_N) in zip(active, groups, strict=True)
    ]
    return (torch.stack(sums) / counts).sum() + features_ND.sum() * 0.0  # NaN is in no group, and must not vanish


def total_loss(
    angle: Tensor,
    norm: Tensor,
    norm_augmented: Tensor,
    lambda_: float = 1.0,
    norm_weight: float = 1.0,
    form: str = "paper",
) -> Tensor:
    """1/(2N) sum_{i <= 2N} lambda 1[i <= N] L_angle + L_norm (ADPretrain Eq. 7), from the means of its terms.

    ``angle``: mean over the N anchors; ``norm`` and ``norm_augmented``: mean over the N tokens of either view.
    ``norm_weight``: weight of both norm terms; 1 in the paper, and 0 leaves only the angle loss (Tab. 2a).
    ``form="released"``: the authors' code sums the terms instead, which doubles the loss: Adam's steps stay the same,
    but a weight decay has half the effect. Raises ValueError for an unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"loss form {form!r} is unknown; choose one of {FORMS}")
    summed = lambda_ * angle + norm_weight * (norm + norm_augmented)
    return summed if form == "released" else summed / 2
