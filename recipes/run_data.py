"""What a run trains on: photographs on disk, or a stream of shards (``data.name: shards``)."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from checked_samples import checked_samples, read_stamp
from rich.console import Console

from adpretrain.config import PretrainConfig
from adpretrain.data import Sample
from adpretrain.data.layouts.detect import HUB
from adpretrain.data.products import by_product, draw_shots
from adpretrain.data.shards import Shards, pinned
from adpretrain.files import atomic_path
from adpretrain.preprocess import Preprocess
from adpretrain.training.dataset import PretrainingSet, StepBatches
from adpretrain.training.streamed import StreamedBatches, StreamedSet

SHARDS = "shards"  # the data.name that streams
COMMITS = "data_commits.json"  # in the run's folder: data.root -> the same at the commit of the run's start
CENTER_SHOTS = 4  # references of an image whose residuals measure the centres, as in the released run
SCALE_IMAGES = 2  # normal images of every product that the local scale is measured on


def held_out_names(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The categories that ``patterns`` ("p09*") match. Raises ValueError for a pattern that matches none."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"held-out category {pattern!r} matches none of: {', '.join(names)}")
    return {name for pattern in patterns for name in fnmatch.filter(names, pattern)}


def split_samples(samples: Sequence[Sample], patterns: Sequence[str]) -> tuple[list[Sample], list[Sample]]:
    """(training, held-out) samples; ``patterns`` are category names or patterns such as "p09*".

    A benchmark's own validation split is left alone.
    """
    samples = [sample for sample in samples if sample.split != "validation"]
    held = held_out_names(sorted({sample.category for sample in samples}), patterns)
    return [s for s in samples if s.category not in held], [s for s in samples if s.category in held]


def samples_of_shards(shards: Shards, patterns: Sequence[str], main: bool) -> tuple[list[Sample], list[Sample]]:
    """(a few normal photographs of every product, the held-out samples of the first process) as files.

    Raises ValueError if a held-out category is among the training shards.
    """
    index = shards.index
    held = held_out_names(sorted({*index.categories, *index.held_out}), patterns)
    if trained := sorted(held - {*index.held_out}):
        raise ValueError(
            f"held-out {', '.join(trained)} is in the training shards of {shards.root}: write them again with "
            f"--data.held_out (apart now: {', '.join(index.held_out) or 'none'})"
        )
    held_out = [sample for sample in shards.samples("held_out") if sample.category in held] if held and main else []
    return shards.samples("references", SCALE_IMAGES), held_out


def root_of_run(config: PretrainConfig, main: bool) -> str:
    """data.root; one of the Hub at the commit that it was at when the run started, for all processes and however often
    the run is resumed. Raises ValueError if it cannot be reached."""
    root, stamp = config.data.root, Path(config.run) / COMMITS
    if not root.startswith(HUB):
        return root
    (found,) = broadcast_object_list([_commit(root, stamp) if main else None])
    if isinstance(found, ValueError):
        raise found
    return found


def _commit(root: str, stamp: Path) -> str | ValueError:
    """The root at its commit, or why it has none: an error raised here would leave the other processes waiting."""
    begun = stamp.with_name("config.yaml").exists()  # what stopped an earlier start may have been mended since
    known = read_stamp(stamp) if begun else {}
    try:
        if root not in known:
            known[root] = pinned(root)
            with atomic_path(stamp) as temporary:
                temporary.write_text(json.dumps(known), encoding="utf-8")
    except ValueError as error:
        return ValueError(str(error))  # without its cause, which cannot be sent
    return known[root]


def find_samples(
    config: PretrainConfig, console: Console, main: bool
) -> tuple[Shards | None, list[Sample], list[Sample]]:
    """(shards if the set is streamed, samples, held-out samples)."""
    if config.data.name == SHARDS:
        shards = Shards(root_of_run(config, main))
        return shards, *samples_of_shards(shards, config.data.held_out, main)
    checked = checked_samples(config.data, Path(config.run), console, main)
    return None, *split_samples(checked, config.data.held_out)


def held_out_products(samples: Sequence[Sample], shots: int, console: Console) -> dict[str, list[Sample]]:
    """The held-out samples by product, those left out and named that have no metrics: a product needs normal and
    defective images beside its ``shots`` references.

    Raises ValueError naming a product with fewer normal images than shots, or if no product has metrics.
    """
    products = by_product(samples)
    scored = {name: draw_shots(group, shots)[1] for name, group in products.items()}
    kinds = {name: {products[name][index].anomalous for index in queries} for name, queries in scored.items()}
    bare = [name for name in products if len(kinds[name]) < 2]
    if bare and len(bare) == len(products):
        raise ValueError(
            f"none of the held-out products can be scored ({', '.join(bare)}): each needs normal and defective images "
            f"beside its {shots} references. Choose other data.held_out, or []"
        )
    if bare:
        told = f"held out, but not scored for want of normal or of defective images: {', '.join(bare)}"
        console.print(told, style="yellow", markup=False, soft_wrap=True)
    return {name: group for name, group in products.items() if name not in bare}


def training_set(
    config: PretrainConfig, shards: Shards | None, samples: Sequence[Sample], preprocess: Preprocess
) -> PretrainingSet | StreamedSet:
    """The images of the steps.

    Raises ValueError for a set without a single defect: both losses tell anomalies from normal tokens, and without any
    the norm loss alone is left, which shrinks all features alike.
    """
    seed = config.cache.seed if config.cache.draws else config.seed
    shots = config.shots if config.matching != "none" else [0]
    common = (preprocess, shots, seed, config.augment)
    data: PretrainingSet | StreamedSet
    if shards is not None:
        data = StreamedSet(shards, *common, config.data.reservoir_mb << 20, config.data.reduced)
        defects = len(data) - sum(shards.index.normals.values())
    else:
        data = PretrainingSet(samples, *common, config.references, config.data.reduced)
        defects = sum(sample.anomalous for sample in data.samples)
    if not defects:
        raise ValueError(
            f"the {len(data)} training images of {config.data.root} show no defect: the losses need anomalies, and "
            "would only shrink the features of normal ones; give a set with marked defects (data.root), or hold fewer "
            "categories out (data.held_out)"
        )
    return data


def step_batches(
    data: PretrainingSet | StreamedSet, config: PretrainConfig, start: int, stop: int, rank: int, processes: int
) -> StepBatches | StreamedBatches:
    """One process's batches of the steps from ``start`` to ``stop``."""
    size = config.optim.batch_size
    if isinstance(data, StreamedSet):
        return StreamedBatches(data, size, start, stop, rank, processes)
    return StepBatches(len(data), size, start, stop, config.seed, rank, processes, data.draws.blocks)


def normal_images(
    data: PretrainingSet | StreamedSet, config: PretrainConfig, rank: int, processes: int
) -> tuple[PretrainingSet | StreamedSet, Iterable[list[Any]], int]:
    """The normal images of a set, plain and with `CENTER_SHOTS` references each (fewer where ``shots`` are); one
    process's batches of them, and how many these are (at most, of a stream, which drops what is less than a batch)."""
    shots, size = [min(CENTER_SHOTS, max(data.shots))], config.optim.batch_size
    if isinstance(data, StreamedSet):
        plain = StreamedSet(data.shards, data.preprocess, shots, data.seed, "none", config.data.reservoir_mb << 20)
        epoch = StreamedBatches(plain, size, 0, 0, rank, processes).per_epoch
        stream = StreamedBatches(plain, size, 0, epoch, rank, processes)
        return plain, ([draw for draw in draws if draw.row.normal] for draws in stream), epoch
    normal = [sample for sample in data.samples if not sample.anomalous]
    plain = PretrainingSet(normal, data.preprocess, shots, data.seed, "none", config.references)
    keys = [(0, index) for block in plain.draws.blocks(0) for index in block]
    own = [keys[start : start + size] for start in range(0, len(keys), size)][rank::processes]
    return plain, own, len(own)


def count_categories(data: PretrainingSet | StreamedSet) -> int:
    """How many the steps come from."""
    streamed = isinstance(data, StreamedSet)
    return len(data.shards.index.categories if streamed else {sample.category for sample in data.samples})


def digest_of(data: PretrainingSet | StreamedSet) -> str:
    """The same for the same images in the same order, wherever they lie: what a step's batch is drawn from."""
    if isinstance(data, StreamedSet):
        facts: object = dataclasses.asdict(data.shards.index)
    else:
        facts = [(s.category, s.defect, s.view, s.split, s.image.name) for s in data.samples]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
