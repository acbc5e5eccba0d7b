"""The state of a pretraining run (data, networks, optimiser, folder, batches), set up from its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from adpretrain.backbones import load_backbone
from adpretrain.config import OptimConfig, PretrainConfig
from adpretrain.data import ImageDataset, Sample
from adpretrain.data.products import by_product
from adpretrain.data.samples import to_learn_from
from adpretrain.extractor import ADExtractor
from adpretrain.local_scale import LocalScale
from adpretrain.preprocess import Preprocess, crop_side
from adpretrain.progress import progress_bar
from adpretrain.projector import FeatureProjector
from adpretrain.training.batches import OnlineBatches, ResidualBatch
from adpretrain.training.cache import CachedBatches, local_processes
from adpretrain.training.costs import check_memory
from adpretrain.training.dataset import PretrainingSet, StepBatches
from adpretrain.training.objective import Objective
from adpretrain.training.run_folder import RunFolder
from adpretrain.training.sources import (
    SCALE_IMAGES,
    find_samples,
    held_out_products,
    normal_images,
    step_batches,
    training_set,
)
from adpretrain.training.speed import Stopwatch, Throughput, peak_flops
from adpretrain.training.streamed import StreamedBatches, StreamedSet


class HeldOut(Protocol):
    """Products kept out of training that are scored while it runs (`downstream.evaluation.few_shot.HeldOut`)."""

    def score(self, extractor: ADExtractor) -> dict[str, float]:
        """``image_auroc`` and ``aupro``, means over the products; nan if no product defines it."""
        ...

    def draw(self, extractor: ADExtractor, folder: Path) -> None:
        """Write heatmaps of a few products."""
        ...


# (samples of every product, references per product, console) -> the object that scores them
Evaluation = Callable[[Sequence[Sequence[Sample]], int, Console], HeldOut]


@dataclass
class Run:
    """Everything that the training loop uses."""

    config: PretrainConfig
    accelerator: Accelerator
    console: Console
    folder: RunFolder
    data: PretrainingSet | StreamedSet
    extractor: ADExtractor
    objective: Objective
    model: nn.Module  # what learns: the extractor's projector, or its backbone's network
    optimizer: Any
    scheduler: torch.optim.lr_scheduler.LRScheduler
    steps: int
    held_out: HeldOut | None  # in the first process, if there are products to score
    speed: Throughput
    baseline: dict[str, float] = field(default_factory=dict)  # the held-out metrics of untrained residuals
    best: dict[str, Any] = field(default_factory=dict)  # step, score and weights of the best projector so far
    varied: set[int] = field(default_factory=set)  # levels whose attention has been seen to vary over tokens
    warned: set[int] = field(default_factory=set)  # levels that have been warned about

    def schedule(self, start: int, stop: int) -> StepBatches | StreamedBatches:
        """This process's batches of the steps from ``start`` to ``stop``."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        return step_batches(self.data, self.config, start, stop, rank, processes)

    @cached_property
    def digest(self) -> str:
        """A digest of the images that the run trains on."""
        return self.data.digest()

    @property
    def global_batch(self) -> int:
        """Images per step of all processes."""
        return self.config.optim.batch_size * self.accelerator.num_processes

    def trained_state(self) -> dict[str, torch.Tensor]:
        """All tensors that training changes or uses: projector (or backbone), centres, local scale."""
        frozen = self.extractor.backbone.frozen
        return {k: v for k, v in self.extractor.state_dict().items() if not (frozen and k.startswith("backbone."))}

    def state(self) -> dict[str, Any]:
        """The content of a checkpoint, without generator states: random numbers derive from seed, epoch and index."""
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else {}
        return {
            "global_batch": self.global_batch,
            "data": self.digest,
            "extractor": self.trained_state(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": scaler,
            "best": self.best,
            "baseline": self.baseline,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`. Raises ValueError if it was trained by another number of processes, on other images,
        or by a version whose checkpoints differ."""
        size, own = self.config.optim.batch_size, self.state()
        ours, theirs = own["extractor"], state.get("extractor", {})
        unlike = (
            name
            for name in ours | theirs
            if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape
        )
        if other := [*own.keys() - state.keys(), *unlike]:
            raise ValueError(
                f"the checkpoints of {self.folder.path} were written by another version (not alike in both: "
                f"{', '.join(sorted(other)[:5])}): resume with that one, or choose another --run"
            )
        if state["global_batch"] != self.global_batch:
            raise ValueError(
                f"{self.folder.path} was trained by {state['global_batch'] // size} processes with {size} images each; "
                f"{self.accelerator.num_processes} would see others in each step: start as many as before"
            )
        if state["data"] != own["data"]:
            raise ValueError(
                f"{self.folder.path} was trained on other images than those of {self.config.data.root}, which would be "
                "mixed with them: give those again (data.root, data.on_error), or choose another --run"
            )
        self.extractor.load_state_dict(state["extractor"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.best, self.baseline = state["best"], state["baseline"]
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def build_extractor(config: PretrainConfig, samples: list[Sample], device: torch.device) -> ADExtractor:
    """Backbone, fresh projector (unless the backbone itself learns) and, if configured, the local scale, which is
    measured on normal training images."""
    backbone = load_backbone(**dataclasses.asdict(config.backbone)).to(device)
    scale = LocalScale(len(backbone.channels), config.local_scale) if config.local_scale is not None else None
    projector = FeatureProjector(backbone.channels, config.projector) if config.learns == "projector" else None
    extractor = ADExtractor(backbone, projector, scale, matching=config.matching).to(device)
    if scale is not None:
        groups = by_product([sample for sample in to_learn_from(samples) if not sample.anomalous]).values()
        chosen = [group[:SCALE_IMAGES] for group in groups if len(group) >= SCALE_IMAGES]
        batches = []
        for group in chosen:
            data = ImageDataset(group, backbone.preprocess)
            batches.append(backbone(torch.stack([data[i]["image"] for i in range(len(data))]).to(device)))
        scale.fit(batches, config.matching)
    return extractor


def set_up(
    config: PretrainConfig, console: Console, accelerator: Accelerator, evaluation: Evaluation | None = None
) -> Run:
    """Index the data, build the networks, the optimiser and the run's folder."""
    given = config.backbone  # find mistakes in it before images are read
    Preprocess(given.image_size, crop_side(given.image_size, given.resize, given.crop_from))
    shards, samples, held_out = find_samples(config, console, accelerator.is_main_process)
    products = held_out_products(held_out, config.eval.shots, console)
    torch.manual_seed(config.seed)
    extractor = build_extractor(config, samples, accelerator.device)
    data = training_set(config, shards, samples, extractor.preprocess)
    if unmarked := len(samples) - len(to_learn_from(samples)):
        console.print(f"{unmarked} unmarked views of defective parts are not trained on", highlight=False)
    rank, processes = accelerator.process_index, accelerator.num_processes
    scored = sum(len(group) for group in products.values())
    check_memory(config, len(data), scored, processes, accelerator.device, console)
    per_epoch = step_batches(data, config, 0, 0, rank, processes).per_epoch
    steps = config.optim.steps or per_epoch * config.optim.epochs
    model = learner(config, extractor, console)
    folder = RunFolder(config, console, accelerator.is_main_process)  # after all steps that a user's mistake could stop
    adam, scheduler = make_optimizer(config.optim, model, steps)
    # accelerate does not prepare the scheduler, which would then step once per process, nor the projector, whose
    # gradients `sum_gradients` sums.
    optimizer = accelerator.prepare(adam)
    objective = Objective(config.loss, extractor, dist.group.WORLD)
    held = None
    if evaluation is not None and products and accelerator.is_main_process:
        held = evaluation(list(products.values()), config.eval.shots, console)
    half = config.optim.precision != "no"
    speed = Throughput(Stopwatch(accelerator.device), peak_flops(accelerator.device, half))
    return Run(
        config,
        accelerator,
        console,
        folder,
        data,
        extractor,
        objective,
        model,
        optimizer,
        scheduler,
        steps,
        held,
        speed,
    )


def learner(config: PretrainConfig, extractor: ADExtractor, console: Console) -> nn.Module:
    """The part of the extractor that learns, with weights of the configured precision."""
    if extractor.projector is None:
        network = extractor.backbone.network
        assert network is not None
        extractor.backbone.unfreeze()
        return network
    if config.optim.weight_decay and config.optim.weights == "float32":
        console.print(
            f"[yellow]optim.weight_decay {config.optim.weight_decay} on float32 weights erases the learnable "
            "references in a long training (their gradient is far smaller than the decay): set it to 0, as the paper "
            "does, or optim.weights to bfloat16, as the released run does"
        )
    return extractor.projector.to(torch.bfloat16) if config.optim.weights == "bfloat16" else extractor.projector


def make_optimizer(
    config: OptimConfig, model: nn.Module, steps: int
) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LRScheduler]:
    """Adam over all parameters, and a schedule that divides its rate by ten at the milestones of ``steps`` steps."""
    adam = torch.optim.Adam(model.parameters(), config.lr, weight_decay=config.weight_decay)
    return adam, torch.optim.lr_scheduler.MultiStepLR(adam, [round(share * steps) for share in config.milestones])


def normal_batches(run: Run) -> Iterator[ResidualBatch]:
    """This process's part of the residuals of all `normal_images`, to measure the centres."""
    config, rank, processes = run.config, run.accelerator.process_index, run.accelerator.num_processes
    normals, steps, count = normal_images(run.data, config, rank, processes)
    online = OnlineBatches(run.extractor, normals, config.data.workers, run.accelerator.device)
    with progress_bar(run.console) as bar:
        yield from bar.track(online(filter(None, steps)), total=count, description="measuring centres")


def make_batches(run: Run) -> Callable[[Any], Iterator[ResidualBatch]]:
    """Residuals of the batches: computed once before training, or step by step."""
    config, device = run.config, run.accelerator.device
    if not config.cache.draws:
        return OnlineBatches(run.extractor, run.data, config.data.workers, device, run.speed.watch)
    assert isinstance(run.data, PretrainingSet)  # a stream is never cached
    with progress_bar(run.console) as bar:
        stages = iter(("encoding images", "matching references"))
        return CachedBatches(
            run.extractor,
            run.data,
            device,
            config.cache.draws,
            config.cache.folder,
            config.cache.threads,
            track=lambda items, total: bar.track(items, total=total, description=next(stages)),
            local=local_processes(run.folder.path, dist.group.WORLD),
        )
