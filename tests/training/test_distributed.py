"""Losses of several processes against one process with all their tokens: values and gradients, in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import together
from torch import Tensor

from adpretrain.losses import angle_loss, norm_loss
from adpretrain.training.distributed import everyone, gather_rows, log_sum_exp

FORMS = ("paper", "released")
# Tokens of every process as (normal, anomalous): ragged, a process without anomalies, one without normal tokens, one
# without any token, and batches without negatives.
SPLITS = {
    "ragged": [(17, 3), (9, 8), (12, 1)],
    "one-sided": [(11, 0), (0, 6), (7, 2)],
    "empty": [(10, 4), (0, 0), (5, 1)],
    "all normal": [(6, 0), (5, 0), (4, 0)],
    "all anomalous": [(0, 6), (0, 5), (0, 4)],
}


def shard(split: list[tuple[int, int]], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both views and the labels of one process, shuffled."""
    normal, anomalous = split[rank]
    rng = torch.Generator().manual_seed(rank)
    first = torch.randn(normal + anomalous, 5, generator=rng, dtype=torch.float64)
    second = first + 0.3 * torch.randn(first.shape, generator=rng, dtype=torch.float64)
    labels = torch.arange(normal + anomalous) < anomalous
    return 0.5 * first, 0.5 * second, labels[torch.randperm(len(labels), generator=rng)]


def values(first: Tensor, second: Tensor, labels: Tensor, group: Any = None) -> dict[str, list[Tensor]]:
    """Every loss with its gradients."""
    center = torch.full((5,), 0.05, dtype=torch.float64)
    found = {}
    for form in FORMS:
        for name in ("angle", "norm"):
            a, b, c = (x.clone().requires_grad_() for x in (first, second, center))
            if name == "angle":
                loss = angle_loss(a, b, labels, c, form=form, chunk_bytes=400, group=group)
            else:
                loss = norm_loss(a, labels, form=form, group=group) + norm_loss(b, labels, form=form, group=group)
            gradients = torch.autograd.grad(loss, [a, b, c], allow_unused=True, materialize_grads=True)
            found[f"{name} {form}"] = [loss.detach(), *gradients]
    return found


def shares(rank: int, count: int) -> dict[str, dict[str, list[Tensor]]]:
    dist.init_process_group("gloo")
    return {name: values(*shard(split[:count], rank), dist.group.WORLD) for name, split in SPLITS.items()}


@pytest.mark.parametrize("count", [2, 3])
def test_shares_and_gradients_sum_to_those_of_one_process(count: int, tmp_path: Path) -> None:
    found = together(count, tmp_path, shares, count)
    for name, split in SPLITS.items():
        parts = [shard(split, rank) for rank in range(count)]
        expected = values(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        for loss, (value, first, second, center) in expected.items():
            ours = [result[name][loss] for result in found]
            pairs = {
                "value": (sum(part[0] for part in ours), value),
                "first view": (torch.cat([part[1] for part in ours]), first),
                "second view": (torch.cat([part[2] for part in ours]), second),
                "centre": (sum(part[3] for part in ours), center),
            }
            for what, (got, wanted) in pairs.items():
                torch.testing.assert_close(
                    got, wanted, rtol=1e-12, atol=1e-12, msg=lambda text, k=(name, loss, what): f"{k}: {text}"
                )


def collectives(rank: int) -> tuple[Tensor, ...]:
    dist.init_process_group("gloo")
    rows = torch.arange(6.0, dtype=torch.float64).view(3, 2)[: 3 - rank].clone().requires_grad_()
    counts = everyone([len(rows), 10 * rank], dist.group.WORLD)
    assert counts == [[3, 0], [2, 10]]
    gathered, own = gather_rows(rows, [count for count, _ in counts], dist.group.WORLD)
    weights = torch.arange(1.0, len(gathered) + 1)[:, None] * (rank + 1)  # the processes use the rows differently
    (gradient,) = torch.autograd.grad((gathered * weights).sum(), rows)
    part = torch.tensor([800.0 + rank, -torch.inf, -torch.inf if rank else 2.0], dtype=torch.float64)
    part.requires_grad_()
    whole = log_sum_exp(part, dist.group.WORLD)
    (share,) = torch.autograd.grad(whole[[0, 2]].sum() * (rank + 1), part)
    return gathered.detach(), gathered.detach()[own], gradient, whole.detach(), share


def test_collectives(tmp_path: Path) -> None:
    results = together(2, tmp_path, collectives)
    rows = torch.tensor([[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]], dtype=torch.float64)
    for rank, (gathered, own, gradient, whole, share) in enumerate(results):
        assert torch.equal(gathered, rows)
        mine = slice(0, 3) if rank == 0 else slice(3, 5)
        assert torch.equal(own, rows[mine])
        assert torch.equal(gradient, (3.0 * torch.arange(1, 6)[:, None].expand(5, 2))[mine].double())  # 1 + 2 users
        terms = torch.tensor([800.0, 801.0], dtype=torch.float64)  # exp overflows
        assert whole.tolist() == pytest.approx([float(terms.logsumexp(0)), -math.inf, 2.0], rel=1e-14)
        assert share.tolist() == pytest.approx([3 * float(terms.softmax(0)[rank]), 0.0, 3.0 - 3 * rank], rel=1e-12)
