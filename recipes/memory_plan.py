"""What a pretraining run will hold, said before it starts, and refused with a remedy where it cannot fit.

The step's part is that of `plan` (weights, Adam, activations, references); here come the residual cache, the kept
reference features, the loader's processes, and the comparison with what there is.
"""

from __future__ import annotations

import os

import torch
from plan import Counts, count, memory
from rich.console import Console
from run_data import SHARDS

from adpretrain.config import PretrainConfig
from adpretrain.memory import hold, readable, total_memory

PROCESS = 1 << 30  # bytes of the smallest run there is, its libraries for the most part (measured)
WORKER = 450 << 20  # of a loader process (measured)
ANOMALOUS = 0.1  # share of the tokens, for the rows that processes send each other
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


def on_device(config: PretrainConfig, counts: Counts, processes: int) -> dict[str, float]:
    """Bytes of the networks and of a step, by the names of `REMEDIES`."""
    planned = memory(config, counts, ANOMALOUS, processes)
    kinds = {"backbone": "backbone", "projector:": "projector", "reference": "references"}
    parts = dict.fromkeys(("backbone", "projector", "references", "step"), 0.0)
    for name, value in planned.items():
        parts[next((part for start, part in kinds.items() if name.startswith(start)), "step")] += value
    # Projected features and their gradients; for the angle loss, their normalised copies too.
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
    """Bytes of a process beside the device: the residual cache of ``images`` photographs while it is made, the stream's
    reservoir, and the loader."""
    values = sum(tokens * width for tokens, width in zip(counts.tokens, counts.widths, strict=True))
    views, draws = (1 if config.augment == "none" else 2), config.cache.draws
    pictures = views + max(config.shots)
    batch = config.optim.batch_size * pictures * 3 * config.backbone.image_size**2  # 8-bit
    workers = 0 if draws else config.data.workers
    return {
        # Half precision, beside the plain features it is made of.
        "residual cache": images * values * (4 + 2 * draws * views) if draws else 0,
        "loader": workers * (WORKER + QUEUED * batch),
        "reservoir": config.data.reservoir_mb << 20 if config.data.name == SHARDS else 0,
        "process": PROCESS,
    }


def check_memory(
    config: PretrainConfig, images: int, held_out: int, processes: int, device: torch.device, console: Console
) -> None:
    """Print what the run of ``images``, with ``held_out`` others scored by its first process, will hold. Raises
    ValueError, with what to change, if that is more than there is."""
    counts = count(config)
    device_parts, host_parts = on_device(config, counts, processes), on_host(config, counts, images)
    values = sum(tokens * width for tokens, width in zip(counts.tokens, counts.widths, strict=True))
    first_parts = {"held-out features": 4 * held_out * values}
    shared_parts = {"residual cache": host_parts.pop("residual cache")}  # by the processes of a machine
    if device.type == "cuda":
        _check(device_parts | first_parts, "the GPU", total_memory(device), console)
        first_parts = {}
    else:
        host_parts |= device_parts
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine, by its launcher
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
