"""The cost of a pretraining run in bytes, FLOPs and messages, counted on the networks of its configuration, built on
the meta device. A run reports its memory before it starts, and is refused with a remedy if it cannot fit.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from adpretrain.backbones import load_backbone
from adpretrain.config import PretrainConfig
from adpretrain.memory import hold, readable, total_memory
from adpretrain.projector import FeatureProjector
from adpretrain.training.sources import SHARDS
from adpretrain.training.speed import count_flops

ADAM = 2  # moments per parameter
FLOAT = 4  # bytes
PROCESS = 1 << 30  # bytes of the smallest run, mostly its libraries (measured)
WORKER = 450 << 20  # bytes of a loader process (measured)
ANOMALOUS = 0.1  # assumed share of anomalous tokens, whose rows processes send each other
QUEUED = 3  # batches that a loader process has read or is reading

REMEDIES = {
    "projector": "a smaller projector (projector.references, projector.mlp_ratio, projector.layers)",
    "step": "a smaller optim.batch_size, or tokens: N",
    "references": "a smaller optim.batch_size, fewer shots, or references.together",
    "backbone": "a smaller backbone or backbone.image_size",
    "residual cache": "fewer cache.draws (0: none, residuals are computed step by step)",
    "kept references": "a smaller references.cache_mb",
    "held-out features": "fewer data.held_out",
    "loader": "fewer data.workers, or a smaller optim.batch_size",
    "reservoir": "a smaller data.reservoir_mb",
}


@dataclass(frozen=True)
class Counts:
    """Counts of the configuration's networks: ``tokens`` and ``widths`` of every level; ``entering``: tokens that are
    projected; FLOPs of one image's forward; ``saved``: bytes that the projector keeps for a backward pass."""

    backbone_bytes: int
    projector_parameters: int
    tokens: list[int]
    entering: list[int]
    widths: list[int]
    backbone_flops: int
    projector_flops: int
    saved: int


def count(config: PretrainConfig) -> Counts:
    """Count on networks that are built on the meta device."""
    with torch.device("meta"):
        backbone = load_backbone(**(dataclasses.asdict(config.backbone) | {"weights": None}), pretrained=False)
        image = torch.zeros(1, 3, config.backbone.image_size, config.backbone.image_size)
        maps = backbone(image)
        images = 2 * config.optim.batch_size
        projector = FeatureProjector(backbone.channels, config.projector)
    tokens = [level.shape[2] * level.shape[3] for level in maps]
    entering = [min(number, config.tokens or number) for number in tokens]
    shapes = [(images, level.shape[1], 1, number) for level, number in zip(maps, entering, strict=True)]
    among = round(mean(config.shots))  # references whose residuals cross attention takes
    contexts = [(images, among * number, level.shape[1]) for level, number in zip(maps, tokens, strict=True)]
    inputs = [[maps[0].new_zeros(*shape) for shape in levels] for levels in (shapes, contexts)]
    return Counts(
        backbone_bytes=sum(parameter.nbytes for parameter in backbone.parameters()),
        projector_parameters=sum(parameter.numel() for parameter in projector.parameters()),
        tokens=tokens,
        entering=entering,
        widths=backbone.channels,
        backbone_flops=count_flops(lambda: backbone(image)),
        projector_flops=count_flops(lambda: projector(*inputs)) // images,
        saved=saved_bytes(config, shapes, contexts),
    )


def saved_bytes(config: PretrainConfig, shapes: Sequence[Sequence[int]], contexts: Sequence[Sequence[int]]) -> int:
    """Bytes of all tensors, except parameters, that autograd keeps of the projector's forward pass on maps of these
    ``shapes``, with cross attention to ``contexts``.

    It runs on fake CPU tensors, whose attention keeps what a GPU's keeps; on the meta device it would keep all weights.
    """
    half = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.optim.precision]
    with FakeTensorMode(), torch.autocast("cpu", half, enabled=half != torch.float32):
        projector = FeatureProjector([shape[1] for shape in shapes], config.projector)
        kept: dict[int, Any] = {p.untyped_storage()._cdata: None for p in projector.parameters()}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()  # held, so that no other storage gets its address
            kept.setdefault(storage._cdata, storage)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            projector(*([torch.zeros(*shape) for shape in levels] for levels in (shapes, contexts)))
        return sum(storage.nbytes() for storage in kept.values() if storage is not None)


def anomalous_tokens(counts: Counts, share: float) -> list[float]:
    """Anomalous tokens of an image and view that `training.batches.thin` keeps, per level: all, up to half of what
    enters, or more if normal ones are too few. An upper limit, as if ``share`` were that of every image."""
    sizes = zip(counts.tokens, counts.entering, strict=True)
    return [min(share * n, max(entering // 2, entering - (1 - share) * n)) for n, entering in sizes]


def gathered_rows(config: PretrainConfig, counts: Counts, share: float, gpus: int) -> list[int]:
    """Anomalous tokens per level, of both views and of all processes that share negatives."""
    sharing = gpus if config.loss.cross_process else 1
    return [round(2 * config.optim.batch_size * number) * sharing for number in anomalous_tokens(counts, share)]


def gather_bytes(config: PretrainConfig, counts: Counts, share: float, gpus: int) -> int:
    """Bytes that every process receives in a step's forward pass, its own part included: rows, and two numbers per row
    for its log-sum-exp. The backward pass sends the rows' gradients and one number per row."""
    rows = gathered_rows(config, counts, share, gpus)
    alone = gpus == 1 or not (config.loss.cross_process and config.loss.lambda_)
    return 0 if alone else sum(FLOAT * n * (width + 2) for n, width in zip(rows, counts.widths, strict=True))


def loss_flops(config: PretrainConfig, counts: Counts, share: float, gpus: int) -> int:
    """FLOPs of the angle loss in one process: normal x anomalous similarities, computed in the forward and again in the
    backward pass, and two products for the gradients."""
    if not config.loss.lambda_:
        return 0
    anomalous, own = (gathered_rows(config, counts, share, number) for number in (gpus, 1))
    normal = [2 * config.optim.batch_size * tokens - rows for tokens, rows in zip(counts.entering, own, strict=True)]
    return sum(4 * 2 * p * q * width for p, q, width in zip(normal, anomalous, counts.widths, strict=True))


def memory(config: PretrainConfig, counts: Counts, share: float, gpus: int) -> dict[str, float]:
    """Bytes on every GPU, by purpose."""
    images, parameters = config.optim.batch_size, counts.projector_parameters
    features = FLOAT * sum(tokens * width for tokens, width in zip(counts.tokens, counts.widths, strict=True))
    return {
        "backbone's weights, frozen": counts.backbone_bytes,
        "projector: weights, gradients (and their message), Adam": FLOAT * parameters * (3 + ADAM),
        "reference features": images * mean(config.shots) * features,
        "features and residuals of both views": 2 * 2 * images * features,
        "kept for the projector's backward": counts.saved,
        "gathered rows and their gradients": 2 * gather_bytes(config, counts, share, gpus),
    }


def checkpoint_bytes(counts: Counts) -> int:
    """Bytes of a checkpoint: weights and Adam's moments, without the frozen backbone."""
    return FLOAT * counts.projector_parameters * (1 + ADAM)


def on_device(config: PretrainConfig, counts: Counts, processes: int) -> dict[str, float]:
    """Bytes of the networks and of a step, by the keys of `REMEDIES`."""
    planned = memory(config, counts, ANOMALOUS, processes)
    kinds = {"backbone": "backbone", "projector:": "projector", "reference": "references"}
    parts = dict.fromkeys(("backbone", "projector", "references", "step"), 0.0)
    for name, value in planned.items():
        parts[next((part for start, part in kinds.items() if name.startswith(start)), "step")] += value
    # Projected features and their gradients, and normalised copies of both for the angle loss.
    copies = 6 if config.loss.lambda_ else 3
    values = sum(entering * width for entering, width in zip(counts.entering, counts.widths, strict=True))
    parts["step"] += copies * 4 * 2 * config.optim.batch_size * values
    if config.augment == "none":
        parts["step"] /= 2  # one view instead of two
    if config.cache.draws:
        parts["references"] = 0
    if config.references.pool:
        parts["kept references"] = config.references.cache_mb << 20
    return parts


def on_host(config: PretrainConfig, counts: Counts, images: int) -> dict[str, float]:
    """Bytes of a process in the host's memory: the residual cache of ``images`` photographs while it is made, the
    stream's reservoir, and the loader."""
    values = sum(tokens * width for tokens, width in zip(counts.tokens, counts.widths, strict=True))
    views, draws = (1 if config.augment == "none" else 2), config.cache.draws
    pictures = views + max(config.shots)
    batch = config.optim.batch_size * pictures * 3 * config.backbone.image_size**2  # 8-bit
    workers = 0 if draws else config.data.workers
    return {
        # In half precision, besides the plain features it is computed from.
        "residual cache": images * values * (4 + 2 * draws * views) if draws else 0,
        "loader": workers * (WORKER + QUEUED * batch),
        "reservoir": config.data.reservoir_mb << 20 if config.data.name == SHARDS else 0,
        "process": PROCESS,
    }


def check_memory(
    config: PretrainConfig, images: int, held_out: int, processes: int, device: torch.device, console: Console
) -> None:
    """Print how much memory a run on ``images`` will hold, with ``held_out`` others scored by its first process. Raises
    ValueError, with what to change, if the memory is too small."""
    counts = count(config)
    device_parts, host_parts = on_device(config, counts, processes), on_host(config, counts, images)
    values = sum(tokens * width for tokens, width in zip(counts.tokens, counts.widths, strict=True))
    first_parts = {"held-out features": 4 * held_out * values}
    shared_parts = {"residual cache": host_parts.pop("residual cache")}  # shared by the processes of a machine
    if device.type == "cuda":
        _check(device_parts | first_parts, "the GPU", total_memory(device), console)
        first_parts = {}
    else:
        host_parts |= device_parts
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine, as its launcher says
    together = {name: here * part for name, part in host_parts.items()} | first_parts | shared_parts
    _check(together, "the machine", total_memory(torch.device("cpu")), console, here)


def _check(parts: dict[str, float], where: str, limit: int, console: Console, processes: int = 1) -> None:
    total = round(sum(parts.values()))
    largest = sorted((name for name in parts if parts[name]), key=lambda name: -parts[name])[:3]
    listing = ", ".join(f"{name} {readable(round(parts[name]))}" for name in largest)
    advice = "; or ".join(REMEDIES[name] for name in largest if name in REMEDIES)
    advice += "; or fewer processes on this machine" if processes > 1 else ""
    what = f"pretraining ({f'{processes} processes: ' if processes > 1 else ''}{listing})"
    hold(what, total, limit, advice, say=False)
    line = f"memory: {what} will hold about {readable(total)} of {where}'s {readable(limit)}"
    console.print(line, highlight=False, soft_wrap=True)
