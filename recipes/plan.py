"""Plan a pretraining run on many GPUs before paying for it: bytes, FLOPs, messages, images per second.

  python recipes/plan.py --config recipes/configs/dinov2-base.yaml --gpus 64

Parameters, FLOPs and activations are counted on the configuration's networks, built on the meta device; the decode time
is measured on this machine; assumptions are flags, and are listed at the end.
"""

from __future__ import annotations

import io
import sys
import time
import timeit
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, median

import numpy as np
from PIL import Image

from adpretrain.config import PretrainConfig
from adpretrain.parsing import from_dict, parse_flags, read_yaml
from adpretrain.photographs import read_image
from adpretrain.preprocess import Preprocess, TwoViews, crop_side
from adpretrain.training.costs import FLOAT, Counts, checkpoint_bytes, count, gather_bytes, loss_flops, memory

REPEATS = 15  # of a measurement, of which the median is taken


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
    """The run to plan, and assumptions about its data and machines. Raises ValueError for numbers up to 0.

    Args:
        config: a pretraining configuration, recipes/configs/*.yaml.
        gpus: number of GPUs.
        gpus_per_node: number of GPUs per machine.
        images: number of images in the set (default: Real-IAD).
        image_kb: assumed mean size of a file.
        image_side: side of the photograph whose decoding is measured.
        peak_tflops: peak of a GPU in half precision (default: H100 SXM, dense).
        peak_float_tflops: peak of a GPU in float32 without TF32.
        mfu: assumed share of the peak that is reached.
        node_gbit: assumed network bandwidth of a node, Gbit/s.
        shares: assumed shares of anomalous tokens.
    """

    config: str
    gpus: int = 64
    gpus_per_node: int = 8
    images: int = 151_050
    image_kb: float = 300
    image_side: int = 1024
    peak_tflops: float = 989
    peak_float_tflops: float = 67
    mfu: float = 0.35
    node_gbit: float = 400
    shares: list[float] = field(default_factory=lambda: [0.01, 0.02, 0.05, 0.1])

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "config" and not np.min(value) > 0:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be more than 0")


def step_seconds(config: PretrainConfig, counts: Counts, share: float, assumed: Assumed) -> dict[str, float]:
    """Seconds of every part of a step, if nothing overlaps."""
    images, nodes = config.optim.batch_size, assumed.gpus / assumed.gpus_per_node
    full = assumed.peak_float_tflops * 1e12 * assumed.mfu
    peak = full if config.optim.precision == "no" else assumed.peak_tflops * 1e12 * assumed.mfu
    # A ring all-reduce sends 2 (n - 1) / n of the bytes over every node's link, an all-gather half of that.
    seconds_per_byte = 2 * (nodes - 1) / nodes / (assumed.node_gbit * 1e9 / 8) if nodes > 1 else 0.0
    return {
        "backbone": images * (2 + mean(config.shots)) * counts.backbone_flops / peak,
        "projector": 3 * 2 * images * counts.projector_flops / peak,
        "angle loss": loss_flops(config, counts, share, assumed.gpus) / full,
        "gradients": FLOAT * counts.projector_parameters * seconds_per_byte,
        "gather": 1.5 * gather_bytes(config, counts, share, assumed.gpus) * seconds_per_byte,
    }


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
    """What the processors, disks and network of a node must deliver for ``rate`` images/s per GPU."""
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
    try:
        assumed = parse_flags(Assumed, argv, __doc__)
        print(report(from_dict(PretrainConfig, read_yaml(assumed.config), assumed.config), assumed))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
