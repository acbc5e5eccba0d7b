"""Communication between the processes of a training run (torch.distributed).

``group``: the processes whose batches together make one batch: `torch.distributed.group.WORLD` in a run of several. In
a run of one process `WORLD` is None, and nothing is sent.

Gradients are summed, not averaged: every process differentiates its share of the global batch's loss.

Shapes: W processes, Q rows of this process, A rows of all of them, D channels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
Group = dist.ProcessGroup | None
# How long processes wait for a silent but living one, which may be checking images or scoring held-out products. A dead
# process is noticed by `adpretrain.training.launch.Lifeline`.
PATIENCE = timedelta(hours=1)


def processes(group: Group) -> int:
    """The number of processes in a group."""
    return 1 if group is None else dist.get_world_size(group)


@functools.cache
def _on_the_host(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same processes that sends messages through the host's memory, without waiting for devices."""
    if dist.get_backend(group) == "gloo":
        return group
    made = dist.new_group(dist.get_process_group_ranks(group), PATIENCE, backend="gloo")
    assert isinstance(made, dist.ProcessGroup)  # this process is one of them
    return made


def everyone(numbers: Sequence[int], group: Group) -> list[list[int]]:
    """Gather a few integers from every process, in the order of ranks. Only hosts wait for each other."""
    if group is None:
        return [list(numbers)]
    found = [torch.empty(len(numbers), dtype=torch.int64) for _ in range(processes(group))]
    dist.all_gather(found, torch.tensor(numbers, dtype=torch.int64), group=_on_the_host(group))
    return torch.stack(found).tolist()


def from_first(value: T, group: Group) -> T:
    """The first process's value, sent (pickled) to all processes. Only hosts wait for each other."""
    box = [value]
    if group is not None:
        dist.broadcast_object_list(box, 0, group=_on_the_host(group))
    return box[0]


@torch.no_grad()
def total(value: Tensor, group: Group) -> Tensor:
    """Sum over the processes, the same bits on each; without gradient."""
    return value if group is None else _reduced(value, dist.ReduceOp.SUM, group)


@torch.no_grad()
def smallest(value: Tensor, group: Group) -> Tensor:
    """Minimum over the processes; without gradient."""
    return value if group is None else _reduced(value, dist.ReduceOp.MIN, group)


def gather_rows(rows_QD: Tensor, counts: Sequence[int], group: Group) -> tuple[Tensor, slice]:
    """Rows of all processes [A, D], in the order of ranks, and the slice of this process's rows; gradients flow back.

    ``counts``: the numbers of rows, one for each process (`everyone`), which may differ or be 0.
    """
    if group is None:
        return rows_QD, slice(0, rows_QD.shape[0])
    rank = dist.get_rank(group)
    start = sum(counts[:rank])
    return _GatherRows.apply(rows_QD, list(counts), rank, group), slice(start, start + counts[rank])


def log_sum_exp(part_A: Tensor, group: Group) -> Tensor:
    """log of the sum over processes of exp(part): [A] -> [A], equal on all processes; gradients flow back."""
    return part_A if group is None else _LogSumExp.apply(part_A, group)


@torch.no_grad()
def sum_gradients(parameters: Iterable[Tensor], group: Group) -> None:
    """Replace every gradient by its sum over the processes, in one message.

    DistributedDataParallel would rearrange its buckets after the first step, so that a resumed run of three or more
    processes would add the same numbers in another order, and end with other bits.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if group is None or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor], group: Group) -> None:
    """Overwrite tensors with those of the first process."""
    for tensor in tensors if group is not None else ():
        dist.broadcast(tensor, 0, group)


def _reduced(value: Tensor, operation: Any, group: Group) -> Tensor:
    value = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(value, operation, group=group)
    return value


class _GatherRows(torch.autograd.Function):
    """Ragged all-gather. Every process uses all rows, so the backward pass sums their gradients over the processes, and
    each keeps those of its own rows."""

    @staticmethod
    def forward(ctx: Any, rows_QD: Tensor, counts: list[int], rank: int, group: Group) -> Tensor:
        ctx.counts, ctx.rank, ctx.group = counts, rank, group
        padded = rows_QD.new_zeros(max(counts), rows_QD.shape[1])
        padded[: counts[rank]] = rows_QD
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        start = sum(ctx.counts[: ctx.rank])
        summed_AD = _reduced(grads[0], dist.ReduceOp.SUM, ctx.group)
        return summed_AD[start : start + ctx.counts[ctx.rank]], None, None, None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part_A: Tensor, group: Group) -> Tensor:
        largest_A = _reduced(part_A, dist.ReduceOp.MAX, group)
        shift_A = largest_A.where(largest_A.isfinite(), 0.0)  # -inf where no process has a term
        whole_A = shift_A + _reduced((part_A - shift_A).exp(), dist.ReduceOp.SUM, group).log()
        ctx.save_for_backward(part_A, whole_A)
        ctx.group = group
        return whole_A

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        part_A, whole_A = ctx.saved_tensors
        shift_A = whole_A.where(whole_A.isfinite(), 0.0)
        return _reduced(grads[0], dist.ReduceOp.SUM, ctx.group) * (part_A - shift_A).exp(), None
