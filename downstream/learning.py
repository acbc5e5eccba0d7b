"""The training loop of detectors that learn a network on normal images: one loop for all of them.

A detector brings a `Learner`, a module whose forward pass is the loss of a step; `learn` draws the images, steps the
optimiser, reports progress and writes checkpoints. Everything random derives from (seed, step), so that a run that was
killed and resumed ends with the same bytes as one that was not.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adpretrain.files import atomic_path
from adpretrain.progress import Progress
from downstream.lessons import LearningConfig, Lesson, Normals, mixed

LOOK_EVERY = 50  # steps after which losses are read from the device and checked


@dataclass
class Workplace:
    """Where a detector learns.

    ``accelerator``: an `accelerate.Accelerator` with several processes or mixed precision; None = this process alone.
    ``checkpoint``: a file that the state is written to every ``save_every`` steps, and removed from when the detector
    is saved; None = nowhere. ``resume``: continue from that file if it exists.
    """

    accelerator: Any = None
    checkpoint: Path | None = None
    save_every: int = 200
    resume: bool = False

    @property
    def rank(self) -> int:
        return 0 if self.accelerator is None else int(self.accelerator.process_index)

    @property
    def processes(self) -> int:
        return 1 if self.accelerator is None else int(self.accelerator.num_processes)


HERE = Workplace()


class Learner(nn.Module):
    """A network that learns: its forward pass takes a `Lesson` and returns the loss, a scalar.

    ``groups`` gives the optimiser's groups of parameters, each with its learning rate ``lr``; ``optimizer`` is AdamW
    unless it is overridden; ``rate`` is the factor of all learning rates after a share of the steps.
    """

    def forward(self, lesson: Lesson) -> Tensor:
        raise NotImplementedError

    def groups(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.groups())

    def rate(self, done: float) -> float:
        """1: a constant learning rate."""
        return 1.0


@contextlib.contextmanager
def drawing(device: torch.device, *numbers: int) -> Iterator[None]:
    """Seed torch's global generators (initial weights, dropout) from numbers, and restore them afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(mixed(*numbers))
        yield


def learn(
    learner: Learner,
    normals: Normals,
    config: LearningConfig,
    what: str,
    place: Workplace | None = None,
    progress: Progress | None = None,
    options: object = None,
) -> list[float]:
    """Train ``learner`` in place and return the loss of every step; it is in evaluation mode afterwards.

    ``what`` is learnt, for messages and the checkpoint, which is of a detector with these ``options``. With several
    processes each takes an equal share of the images of a step, gradients are averaged, and batch statistics are those
    of the share. ``progress(what, done, total)`` is called after every step. Raises ValueError for a loss that is not
    finite, or a checkpoint of another run.
    """
    place = place or HERE
    optimizer: Any = learner.optimizer()
    rates = [group["lr"] for group in optimizer.param_groups]
    saved = Saved(what, options or config, normals, place)
    losses = saved.restore(learner, optimizer)
    pending: list[Tensor] = []
    model: Any = learner.train()
    if place.accelerator is not None:
        model, optimizer = place.accelerator.prepare(learner, optimizer)
    device = normals.images.device
    for step in range(len(losses), config.steps):
        lesson = normals.lesson(config, step, place.rank, place.processes)
        if config.reset_every and step and step % config.reset_every == 0:
            optimizer.state.clear()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * learner.rate(lesson.done)
        pending.append(_step(model, optimizer, lesson, config, place, device))
        if progress is not None:
            progress(what, step + 1, config.steps)
        due = place.checkpoint is not None and (step + 1) % place.save_every == 0
        if due or len(pending) == LOOK_EVERY or step + 1 == config.steps:
            losses += _read(pending, len(losses), place)
            pending = []
        if due:
            saved.write(learner, optimizer, losses)
    learner.eval()
    return losses


def _step(
    model: Any, optimizer: Any, lesson: Lesson, config: LearningConfig, place: Workplace, device: torch.device
) -> Tensor:
    """One step; the loss, still on its device."""
    autocast = contextlib.nullcontext() if place.accelerator is None else place.accelerator.autocast()
    with drawing(device, config.seed, lesson.step, place.rank), torch.enable_grad():
        with autocast:
            loss: Tensor = model(lesson)
        optimizer.zero_grad()
        if place.accelerator is None:
            loss.backward()
        else:
            place.accelerator.backward(loss)
    if config.clip:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        clip = torch.nn.utils.clip_grad_norm_ if place.accelerator is None else place.accelerator.clip_grad_norm_
        clip(weights, config.clip)
    optimizer.step()
    return loss.detach()


def _read(pending: Sequence[Tensor], before: int, place: Workplace) -> list[float]:
    """The losses of steps, means over processes. Raises ValueError for the first that is not finite."""
    losses = torch.stack(list(pending)).float()
    if place.accelerator is not None:
        losses = place.accelerator.reduce(losses, "mean")
    read = [float(loss) for loss in losses.tolist()]
    for number, loss in enumerate(read, before + 1):
        if not math.isfinite(loss):
            raise ValueError(f"the loss of step {number} is {loss}: lower the learning rate")
    return read


@dataclass
class Saved:
    """The checkpoint of a run: weights, optimiser and losses, and of which images and options they are."""

    what: str
    options: object
    normals: Normals
    place: Workplace

    @cached_property
    def about(self) -> str:
        return json.dumps([self.what, repr(self.options), self.normals.digest(), self.place.processes])

    def write(self, learner: Learner, optimizer: Any, losses: Sequence[float]) -> None:
        """Write the checkpoint, in the first process."""
        if self.place.rank or self.place.checkpoint is None:
            return
        scaler = getattr(self.place.accelerator, "scaler", None)
        state = {
            "about": self.about,
            "learner": learner.state_dict(),
            "optimizer": optimizer.state_dict(),
            "losses": torch.tensor(losses, dtype=torch.float64),
            "scaler": scaler.state_dict() if scaler else {},
        }
        with atomic_path(self.place.checkpoint) as temporary:
            torch.save(state, temporary)

    def restore(self, learner: Learner, optimizer: torch.optim.Optimizer) -> list[float]:
        """Continue from the checkpoint, and return the losses so far; [] if there is none. Raises ValueError if it is
        of another run."""
        path = self.place.checkpoint
        if path is None or not self.place.resume or not path.is_file():
            return []
        state = torch.load(path, map_location=self.normals.images.device, weights_only=True)
        if state.get("about") != self.about:
            raise ValueError(
                f"{os.fspath(path)} was written with other photographs, options or processes: give those again, or "
                "start anew without --resume"
            )
        learner.load_state_dict(state["learner"])
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.place.accelerator.scaler.load_state_dict(state["scaler"])
        return [float(loss) for loss in state["losses"].tolist()]
