"""What a pretraining run on many GPUs needs, before it is paid for: bytes, FLOPs, messages, images per second.

  python recipes/plan.py --config recipes/configs/dinov2-base.yaml --gpus 64

Parameters, FLOPs and activations are counted on the configuration's real networks, made without weights or memory; the
decode time is measured on this machine; what is assumed is a flag, and is said at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import sys
import time
import timeit
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from flags import Help
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from adpretrain.backbones import load_backbone
from adpretrain.config import PretrainConfig
from adpretrain.parsing import from_dict, read_yaml
from adpretrain.photographs import read_image
from adpretrain.preprocess import Preprocess, TwoViews, crop_side
from adpretrain.projector import FeatureProjector
from adpretrain.training.speed import count_flops

ADAM = 2  # moments per parameter
FLOAT = 4  # bytes
REPEATS = 15  # of a measurement, whose median counts


@dataclass(frozen=True)
class Counts:
    """Of the configuration's networks: ``tokens`` and ``widths`` of every level, of which ``entering`` are projected;
    FLOPs of one image's forward; ``saved``: bytes that the projector keeps of a step for its backward pass."""

    backbone_bytes: int
    projector_parameters: int
    tokens: list[int]
    entering: list[int]
    widths: list[int]
    backbone_flops: int
    projector_flops: int
    saved: int


def count(config: PretrainConfig) -> Counts:
    """Build the networks without memory, and count."""
    with torch.device("meta"):
        backbone = load_backbone(**(dataclasses.asdict(config.backbone) | {"weights": None}), pretrained=False)
        image = torch.zeros(1, 3, config.backbone.image_size, config.backbone.image_size)
        maps = backbone(image)
        images = 2 * config.optim.batch_size
        projector = FeatureProjector(backbone.channels, config.projector)
    tokens = [level.shape[2] * level.shape[3] for level in maps]
    entering = [min(number, config.tokens or number) for number in tokens]
    shapes = [(images, level.shape[1], 1, number) for level, number in zip(maps, entering, strict=True)]
    among = round(mean(config.shots))  # whose residuals cross attention takes
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
    """Bytes of all tensors that autograd keeps of the projector's forward pass on maps of these ``shapes``, with cross
    attention to ``contexts``, the parameters left out.

    On fake tensors of the CPU, whose attention keeps what a GPU's keeps; the meta device's keeps all weights.
    """
    half = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.optim.precision]
    with FakeTensorMode(), torch.autocast("cpu", half, enabled=half != torch.float32):
        projector = FeatureProjector([shape[1] for shape in shapes], config.projector)
        kept: dict[int, Any] = {p.untyped_storage()._cdata: None for p in projector.parameters()}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()  # held, so that no other gets its address
            kept.setdefault(storage._cdata, storage)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            projector(*([torch.zeros(*shape) for shape in levels] for levels in (shapes, contexts)))
        return sum(storage.nbytes() for storage in kept.values() if storage is not None)


def anomalous_tokens(counts: Counts, share: float) -> list[float]:
    """Those of an image and view that enter, per level, as `training.batches.thin` chooses: all, up to half of what
    enters, more if normal ones are too few. An upper limit: as if every image had the same ``share`` of all tokens."""
    sizes = zip(counts.tokens, counts.entering, strict=True)
    return [min(share * n, max(entering // 2, entering - (1 - share) * n)) for n, entering in sizes]


def gathered_rows(config: PretrainConfig, counts: Counts, share: float, gpus: int) -> list[int]:
    """Anomalous tokens of both views, of all processes whose negatives are shared; per level."""
    sharing = gpus if config.loss.cross_process else 1
    return [round(2 * config.optim.batch_size * number) * sharing for number in anomalous_tokens(counts, share)]


def gather_bytes(config: PretrainConfig, counts: Counts, share: float, gpus: int) -> int:
    """What every process gets in a step's forward pass, its own part included: rows, and two numbers of each for its
    log-sum-exp. Backwards come the rows' gradients and one number of each."""
    rows = gathered_rows(config, counts, share, gpus)
    alone = gpus == 1 or not (config.loss.cross_process and config.loss.lambda_)
    return 0 if alone else sum(FLOAT * n * (width + 2) for n, width in zip(rows, counts.widths, strict=True))


def loss_flops(config: PretrainConfig, counts: Counts, share: float, gpus: int) -> int:
    """Of the angle loss in one process: normal x anomalous similarities, once forward and once again backward, and two
    products for the gradients."""
    if not config.loss.lambda_:
        return 0
    anomalous, own = (gathered_rows(config, counts, share, number) for number in (gpus, 1))
    normal = [2 * config.optim.batch_size * tokens - rows for tokens, rows in zip(counts.entering, own, strict=True)]
    return sum(4 * 2 * p * q * width for p, q, width in zip(normal, anomalous, counts.widths, strict=True))


def photograph(side: int) -> bytes:
    """A JPEG of ``side`` pixels with soft shapes and grain."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
    soft = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    buffer = io.BytesIO()
    grainy = np.clip(soft + rng.normal(0, 4, soft.shape), 0, 255).astype(np.uint8)
    Image.fromarray(grainy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@dataclass(frozen=True)
class Assumed:
    """What no machine here can say, the command's flags. Raises ValueError for a number that is not more than 0."""

    gpus: int
    gpus_per_node: int
    peak_tflops: float
    peak_float_tflops: float
    mfu: float
    node_gbit: float
    images: int
    image_kb: float
    image_side: int
    shares: Sequence[float]

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not np.min(value) > 0:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be more than 0")


def step_seconds(config: PretrainConfig, counts: Counts, share: float, assumed: Assumed) -> dict[str, float]:
    """Where a step's time goes, nothing overlapping."""
    images, nodes = config.optim.batch_size, assumed.gpus / assumed.gpus_per_node
    full = assumed.peak_float_tflops * 1e12 * assumed.mfu
    peak = full if config.optim.precision == "no" else assumed.peak_tflops * 1e12 * assumed.mfu
    # A ring's sum passes 2 (n - 1) / n of the bytes over every node's link, a gather half of that.
    seconds_per_byte = 2 * (nodes - 1) / nodes / (assumed.node_gbit * 1e9 / 8) if nodes > 1 else 0.0
    return {
        "backbone": images * (2 + mean(config.shots)) * counts.backbone_flops / peak,
        "projector": 3 * 2 * images * counts.projector_flops / peak,
        "angle loss": loss_flops(config, counts, share, assumed.gpus) / full,
        "gradients": FLOAT * counts.projector_parameters * seconds_per_byte,
        "gather": 1.5 * gather_bytes(config, counts, share, assumed.gpus) * seconds_per_byte,
    }


def memory(config: PretrainConfig, counts: Counts, share: float, gpus: int) -> dict[str, float]:
    """Bytes on every GPU."""
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
    """Weights and Adam's moments; the frozen backbone is not in it."""
    return FLOAT * counts.projector_parameters * (1 + ADAM)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--config", required=True, help="a pretraining configuration, recipes/configs/*.yaml")
    parser.add_argument("--gpus", type=int, default=64, help="that are trained on")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="of a machine")
    parser.add_argument("--images", type=int, default=151_050, help="of the set (Real-IAD)")
    parser.add_argument("--image-kb", type=float, default=300, help="assumed mean size of a file")
    parser.add_argument("--image-side", type=int, default=1024, help="of the photograph whose decoding is measured")
    parser.add_argument("--peak-tflops", type=float, default=989, help="of a GPU, half precision (H100 SXM, dense)")
    parser.add_argument("--peak-float-tflops", type=float, default=67, help="of a GPU, float32 without TF32")
    parser.add_argument("--mfu", type=float, default=0.35, help="assumed share of the peak that is reached")
    parser.add_argument("--node-gbit", type=float, default=400, help="assumed network of a node, Gbit/s")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1], help="anomalous tokens")
    return parser.parse_args(argv)


def steps_table(config: PretrainConfig, counts: Counts, assumed: Assumed) -> list[str]:
    """A row for every share of anomalous tokens."""
    steps = [step_seconds(config, counts, share, assumed) for share in assumed.shares]
    head = ["anomalous tokens", "gathered, MB", *(f"{name}, ms" for name in steps[0]), "step, ms", "images/s", "hours"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for share, parts in zip(assumed.shares, steps, strict=True):
        rate = assumed.gpus * config.optim.batch_size / sum(parts.values())
        hours = config.optim.epochs * assumed.images / rate / 3600
        cells = [f"{100 * share:g} %", f"{gather_bytes(config, counts, share, assumed.gpus) / 1e6:.0f}"]
        cells += [f"{1e3 * value:.1f}" for value in parts.values()]
        cells += [f"{1e3 * sum(parts.values()):.0f}", f"{rate:.0f}", f"{hours:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def host_lines(config: PretrainConfig, rate: float, assumed: Assumed) -> list[str]:
    """What the processors, disks and network of a node must give for ``rate`` images/s a GPU."""
    size = config.backbone.image_size
    preprocess = Preprocess(size, crop_side(size, config.backbone.resize, config.backbone.crop_from))
    content = photograph(assumed.image_side)
    reduced, two_views = preprocess.shorter_side if config.data.reduced else None, TwoViews(preprocess)
    draws = iter(range(REPEATS))
    works = (
        lambda: preprocess.pixels(read_image(io.BytesIO(content), reduced)),
        lambda: two_views(read_image(io.BytesIO(content), reduced), next(draws)),
    )
    read, both = (median(timeit.repeat(work, timer=time.process_time, number=1, repeat=REPEATS)) for work in works)
    references, stream = mean(config.shots), rate * assumed.gpus_per_node * assumed.image_kb / 1e3
    return [
        f"Reading: {stream:.0f} MB/s a node from shards, each image once ({stream * (1 + references):.0f} MB/s from "
        f"single files, references too); {assumed.images * assumed.image_kb / 1e6:.0f} GB an epoch for all nodes.",
        f"Decoding (here: {assumed.image_side} px, {len(content) / 1e3:.0f} kB): {1e3 * read:.1f} ms a reference, "
        f"{1e3 * both:.1f} ms an image with two views, so {rate * (both + references * read):.1f} cores a GPU.",
    ]


def report(config: PretrainConfig, assumed: Assumed) -> str:
    """The plan as Markdown."""
    counts = count(config)
    first, batch = assumed.shares[0], config.optim.batch_size
    stored = memory(config, counts, first, assumed.gpus)
    rate = batch / sum(step_seconds(config, counts, first, assumed).values())
    sizes = zip(counts.tokens, counts.entering, counts.widths, strict=True)
    levels = [f"{tokens} tokens ({entering} enter) x {width}" for tokens, entering, width in sizes]
    return "\n".join(
        [
            f"{assumed.gpus} GPUs on {assumed.gpus / assumed.gpus_per_node:g} nodes, {batch} images a GPU and step",
            "",
            f"Backbone: {counts.backbone_flops / 1e9:.1f} GFLOP an image. Projector: "
            f"{counts.projector_parameters / 1e6:.1f} M parameters, {counts.projector_flops / 1e9:.1f} GFLOP an image. "
            f"Levels: {', '.join(levels)}.",
            "",
            f"| on every GPU, at {100 * first:g} % anomalous tokens | GB |",
            "|---|---|",
            *(f"| {name} | {value / 1e9:.2f} |" for name, value in stored.items()),
            f"| **sum** | **{sum(stored.values()) / 1e9:.2f}** |",
            f"| a checkpoint, written by the first process | {checkpoint_bytes(counts) / 1e9:.2f} |",
            "",
            *steps_table(config, counts, assumed),
            "",
            f"At {100 * first:g} %, {rate:.0f} images/s a GPU. " + "\n".join(host_lines(config, rate, assumed)),
            "",
            f"Assumed: {assumed.images} images of {assumed.image_kb:g} kB, {assumed.peak_tflops:g} TFLOP/s in half and "
            f"{assumed.peak_float_tflops:g} in single precision, {100 * assumed.mfu:g} % of it reached, "
            f"{assumed.node_gbit:g} Gbit/s a node, nothing overlaps, nothing is lost within a node, no reference "
            "serves two images of a step, all images have that share of anomalous tokens.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = vars(parse(argv))
    path = options.pop("config")
    try:
        print(report(from_dict(PretrainConfig, read_yaml(path), path), Assumed(**options)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
