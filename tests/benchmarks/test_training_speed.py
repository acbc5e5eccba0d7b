"""A pretraining step against its unavoidable parts and against the released loop written out plainly.

Run by `make bench`. CPU time of this process, images being decoded by another one; where a GPU is at hand, wall time
of DINOv2-base geometry as well. Times do not depend on the weights' values, so random ones serve.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from products import make_synthetic
from rich.console import Console
from torch import Tensor, nn

from adpretrain.backbones import Backbone, load_backbone
from adpretrain.backbones.dinov2 import DinoV2
from adpretrain.config import LossConfig, OptimConfig, PretrainConfig, ProjectorConfig, ReferencesConfig
from adpretrain.data.layouts.realiad import index_realiad
from adpretrain.extractor import ADExtractor
from adpretrain.projector import FeatureProjector
from adpretrain.residual import tokens
from adpretrain.training.batches import OnlineBatches, encode, encode_batch, token_labels
from adpretrain.training.dataset import PretrainingSet, StepBatches
from adpretrain.training.loader import ImageBatch, Request, load_ahead
from adpretrain.training.objective import Objective
from adpretrain.training.run import advance
from adpretrain.training.speed import Stopwatch, Throughput, peak_flops
from adpretrain.training.state import Run

pytestmark = pytest.mark.benchmark

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
OWN, TOGETHER, POOL = ReferencesConfig(), ReferencesConfig(together=4), ReferencesConfig(pool=9)
WAYS = {"each its own": OWN, "4 together": TOGETHER, "pool of 9": POOL}


class Bench:
    """A small pretraining set, a frozen backbone and the recipe's training step."""

    def __init__(self, root: Path, backbone: Backbone, projector: ProjectorConfig, batch: int, precision: str) -> None:
        self.accelerator = Accelerator(mixed_precision=precision)
        self.device = self.accelerator.device
        torch.manual_seed(0)
        model = FeatureProjector(backbone.channels, projector)
        for parameter in model.parameters():  # untrained, it would return its input whatever the attention does
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.5 * parameter.shape[-1] ** -0.5)
        self.extractor = ADExtractor(backbone, model, matching="cosine").to(self.device)
        loss = LossConfig(angle_form="released", norm_form="released")
        self.config = PretrainConfig(projector=projector, loss=loss, optim=OptimConfig(batch_size=batch))
        self.samples, self.batch = index_realiad(root), batch
        self.start = copy.deepcopy(model.state_dict())

    def run(self, speed: Throughput | None = None) -> Any:
        """What the recipe's step needs, with the weights of the beginning."""
        model = self.extractor.projector.train()
        model.load_state_dict(self.start)
        adam = torch.optim.Adam(model.parameters(), 1e-4)
        schedule = torch.optim.lr_scheduler.MultiStepLR(adam, [10**6])
        objective, console = Objective(self.config.loss, self.extractor), Console(quiet=True)
        return Run(
            self.config, self.accelerator, console, None, None, self.extractor, objective, model,
            self.accelerator.prepare(adam), schedule, 0, None, speed or Throughput(Stopwatch(self.device)),
        )  # fmt: skip

    def data(self, references: ReferencesConfig) -> PretrainingSet:
        return PretrainingSet(self.samples, self.extractor.preprocess, [1, 4, 8], 0, references=references)

    def steps(self, data: PretrainingSet, count: int | None = None) -> StepBatches:
        """An epoch, so that what is made once for many steps is paid in full."""
        steps = StepBatches(len(data), self.batch, 0, 0, 0, blocks=data.draws.blocks)
        return StepBatches(len(data), self.batch, 0, count or steps.per_epoch, 0, blocks=data.draws.blocks)

    # The recipe

    def recipe(
        self, references: ReferencesConfig, workers: int, count: int | None = None, speed: Throughput | None = None
    ) -> Iterator[float]:
        """The losses of an epoch, or of ``count`` steps, as the recipe trains."""
        run, data, first = self.run(speed), self.data(references), True
        loaded = OnlineBatches(self.extractor, data, workers, self.device, run.speed.watch)
        source = iter(loaded(self.steps(data, count)))
        run.speed.restart()
        while True:
            with self.accelerator.autocast():
                batch = next(source, None)
            if batch is None:
                return
            yield advance(run, batch, first)[1].values()[0]
            first = False

    def parts(self, workers: int) -> Iterator[None]:
        """Every step's unavoidable parts: the backbone's forwards of views and references, and the projector forward
        and backward, of tensors that are there."""
        model = self.extractor.projector.train()
        data = self.data(OWN)
        batches = list(load_ahead(data.load, map(Request, self.steps(data)), workers, self.device))
        with torch.no_grad(), self.accelerator.autocast():
            views = encode_batch(self.extractor, batches[0], {}).views
        both = [torch.cat(level) for level in zip(*views, strict=True)]  # the values do not matter for the time
        yield
        for batch in batches:
            with torch.no_grad(), self.accelerator.autocast():
                encode(self.extractor, batch.views.flatten(0, 1))
                for _, pixels in batch.units:
                    encode(self.extractor, pixels)
            with self.accelerator.autocast():
                projected = model(both)
            torch.autograd.backward(projected, both)
            model.zero_grad(set_to_none=True)
            yield

    def released(self, workers: int, count: int | None = None) -> Iterator[float]:
        """The released loop, written out plainly: references of every image, keys and values per sample, dense masked
        losses."""
        run, data = self.run(), self.data(OWN)
        for batch in load_ahead(data.load, map(Request, self.steps(data, count)), workers, self.device):
            with torch.no_grad(), self.accelerator.autocast():
                views = self.released_residuals(batch)
            with self.accelerator.autocast():
                levels = self.extractor.projector.levels
                out = [[per_sample(level, x) for level, x in zip(levels, view, strict=True)] for view in views]
            side = round(out[0][0].shape[1] ** 0.5)
            label = token_labels(batch.masks, (side, side)).flatten().to(self.device)
            losses = []
            for level, pair in enumerate(zip(*out, strict=True)):
                first, second = (view.flatten(0, 1).float() for view in pair)
                angle = dense_angle(first, second, label, getattr(self.extractor, f"center_{level}"))
                losses.append(angle / 2 + (plain_norm(first, label) + plain_norm(second, label)) / 2)
            loss = torch.stack(losses).sum()
            run.accelerator.backward(loss)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            yield float(loss.detach())

    def released_residuals(self, batch: ImageBatch) -> list[list[Tensor]]:
        """Of both views, L levels [B, T, C]."""
        normalise, backbone = self.extractor.preprocess.normalise, self.extractor.backbone
        views = [backbone(normalise(view)) for view in batch.views.unbind(1)]
        known = {name: row for names, pixels in batch.units for name, row in zip(names, pixels, strict=True)}
        chosen = [names for images, names in batch.sets for _ in range(images)]
        references = backbone(normalise(torch.stack([known[name] for names in chosen for name in names])))
        counts = [len(names) for names in chosen]
        banks = [[tokens(part).flatten(0, 1) for part in level.split(counts)] for level in references]
        return [
            [torch.stack([*map(plain_residual, level, bank)]) for level, bank in zip(view, banks, strict=True)]
            for view in views
        ]


def plain_residual(feature_CHW: Tensor, bank_NC: Tensor) -> Tensor:
    """[T, C]: the features minus their cosine-nearest references."""
    query = feature_CHW.flatten(1).T
    nearest = (F.normalize(query, dim=1) @ F.normalize(bank_NC, dim=1).T).argmax(1)
    return query - bank_NC[nearest]


def per_sample(level: Any, x_BTC: Tensor) -> Tensor:
    """The projector of one level with its references repeated for every sample, as `nn.MultiheadAttention` wants it."""
    attention = level.attention[0]
    context = level.reference_projection(level.references.expand(x_BTC.shape[0], -1, -1))
    key, value = attention.project_context(context)
    query = attention._split(attention.query(x_BTC))
    attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    return level.mlp[0](x_BTC - attention.out(attended))


def dense_angle(first: Tensor, second: Tensor, label: Tensor, center: Tensor, tau: float = 0.15) -> Tensor:
    """All [2N, 2N] similarities, masked by labels."""
    shifted = F.normalize(torch.cat([first, second]) - center, dim=1)
    mark = label.repeat(2)
    exponentials = (shifted @ shifted.T / tau).exp()
    negatives = (exponentials * (mark[:, None] != mark[None])).sum(1)
    positives = (shifted * shifted.roll(len(first), 0)).sum(1) / tau
    return (negatives.log() - positives).mean() if label.any() else shifted.sum() * 0.0


def plain_norm(features: Tensor, label: Tensor, radius: float = 0.4, margin: float = 0.75) -> Tensor:
    norm = (features.norm(dim=1) + 1).sqrt() - 1
    normal, anomalous = norm[~label], norm[label]
    outer = min(0.9 * float(anomalous.detach().min()), radius) if len(anomalous) else radius
    inner = 0.99 * outer
    total = features.sum() * 0.0
    for gap in (normal - outer, inner - normal, outer + margin - anomalous):
        if (gap > 0).any():
            gap = gap[gap > 0]
            total = total + (-F.logsigmoid(-gap) * gap.detach().exp()).mean()
    return total


def step_seconds(
    device: torch.device, works: dict[str, Iterator[object]], speeds: dict[str, Throughput]
) -> dict[str, list[float]]:
    """Of every step of every work: CPU time of this process, or wall time of a device. The works take turns step by
    step: a busy spell of the machine meets all of them alike."""
    now = time.process_time if device.type == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in works}
    while works:
        for name, steps in list(works.items()):
            if name in speeds:
                speeds[name].watch.seconds()  # forgets the others' turns
            start = now()
            if next(steps, "end") == "end":
                del works[name]
                continue
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(now() - start)
            if name in speeds:
                speeds[name].line()
    return seconds


def measure(bench: Bench, workers: int, rounds: int) -> None:
    """The least time of every single step over a few rounds."""
    ours, theirs = next(bench.recipe(OWN, 0, 1)), next(bench.released(0, 1))
    assert ours == pytest.approx(theirs, rel=1e-3 if bench.device.type == "cpu" else 2e-2)
    peak = peak_flops(bench.device, bench.accelerator.mixed_precision != "no")
    speeds = {name: Throughput(Stopwatch(bench.device), peak) for name in WAYS}
    best: dict[str, list[float]] = {}
    for _ in range(rounds):
        works: dict[str, Iterator[object]] = {
            name: bench.recipe(way, workers, speed=speeds[name]) for name, way in WAYS.items()
        }
        works["unavoidable parts"] = parts = bench.parts(workers)
        next(parts)
        works["released loop"] = bench.released(workers)
        for name, seconds in step_seconds(bench.device, works, speeds).items():
            best[name] = list(map(min, seconds, best.get(name, seconds)))
    total = {name: sum(seconds) for name, seconds in best.items()}
    rates = {name: len(best[name]) * bench.batch / seconds for name, seconds in total.items()}
    for name, rate in rates.items():
        shares = f"; {speeds[name].summary().partition('; ')[2]}" if name in speeds else ""
        print(f"\n{name}: {rate:.2f} images/s{shares}", end="")
    over = total["each its own"] / total["unavoidable parts"]
    times = {name: total["released loop"] / total[name] for name in WAYS}
    if path := os.environ.get("GPU_JSON"):  # tests/gpu.sh
        phases = {name: speed.overall() for name, speed in speeds.items()}
        found = {"images_per_s": rates, "phases": phases, "step_over_parts": over, "released_over_ours": times}
        Path(path).write_text(json.dumps(found, indent=2), encoding="utf-8")
    print(f"\nstep over its unavoidable parts: {over:.3f}; released loop over ours:", times)
    assert over <= 1.15
    assert times["each its own"] >= 1.3
    assert min(times["4 together"], times["pool of 9"]) >= 2.2


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))


def test_small_vit_on_the_cpu(recipes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ViT of width 384 and 12 blocks, 8 x 8 tokens, N_r = 512 (as many per token as the paper's 2048 for 16 x 16)."""
    from accelerate import PartialState
    from transformers import Dinov2Config, Dinov2Model

    monkeypatch.setattr(PartialState, "default_device", torch.device("cpu"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    geometry = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    backbone = DinoV2(Dinov2Model(geometry), "dinov2-small", 112, [3, 6, 9, 12])
    root = make_synthetic(tmp_path / "set", 2, 18, 6, size=128, seed=1, workers=1, progress=False)
    measure(Bench(root, backbone, ProjectorConfig(references=512), 12, "no"), workers=1, rounds=2)
    torch.set_num_threads(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_dinov2_base_on_a_gpu(recipes: None, tmp_path: Path) -> None:
    root = make_synthetic(tmp_path / "set", 6, 60, 20, size=256, seed=1, workers=8, progress=False)
    backbone = load_backbone("dinov2-base", pretrained=False)
    measure(Bench(root, backbone, ProjectorConfig(), 32, "bf16"), workers=12, rounds=3)
