"""The images that a run trains on: photographs on disk, or a stream of shards (``data.name: shards``).

All photographs are checked once before training, so that no unreadable one stops a run half-way.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.markup import escape

from adpretrain.config import DataConfig, PretrainConfig
from adpretrain.data import Sample, index_with_bare
from adpretrain.data.checking import check_samples
from adpretrain.data.layouts.detect import HUB
from adpretrain.data.products import by_product, draw_shots
from adpretrain.data.shards import Shards, pinned
from adpretrain.files import atomic_path
from adpretrain.preprocess import Preprocess
from adpretrain.progress import progress_bar
from adpretrain.training.dataset import PretrainingSet, StepBatches
from adpretrain.training.distributed import from_first
from adpretrain.training.streamed import StreamedBatches, StreamedSet

SHARDS = "shards"  # the data.name that streams
STAMP = "checked.json"  # in the run's folder: a digest of the checked files, and their problems
COMMITS = "data_commits.json"  # in the run's folder: data.root -> data.root at its commit when the run began
CENTER_SHOTS = 4  # references per image when the centres are measured, as in the released run
SCALE_IMAGES = 2  # normal images of every product that the local scale is measured on


def checked_samples(config: DataConfig, run: Path, console: Console, main: bool) -> list[Sample]:
    """The samples of a data set after `checked`."""
    return checked(config, *index_with_bare(config.name, config.root, config.columns), run, console, main)


def checked(
    config: DataConfig, samples: list[Sample], missing: Mapping[Path, str], run: Path, console: Console, main: bool
) -> list[Sample]:
    """Check images and masks as `adpretrain check-data` does; the first process does this for all.

    A check is remembered in the run's folder and not repeated while paths, sizes, times and labels stay the same.
    Raises ValueError with the whole list of bad images, or leaves them out, as ``config.on_error`` says. Images that
    are left out are listed when they are found, and only counted when the run is resumed.
    """
    found = _problems(samples, missing, config.root, run, console) if main else ([], False)
    problems, remembered = from_first(found, dist.group.WORLD)
    if not problems:
        return samples
    listing = "\n".join(reason for _, reason in problems)
    bad = {image for image, _ in problems}
    if config.on_error == "fail":
        raise ValueError(
            f"{len(bad)} of {len(samples)} images cannot be trained on:\n{listing}\n"
            "repair or remove them, or leave them out with --data.on_error skip"
        )
    told = f"[yellow]{len(bad)} of {len(samples)} images are left out[/]"
    told += f", as before; {escape(str(run / STAMP))} lists them" if remembered else f":\n{escape(listing)}"
    console.print(told, highlight=False, soft_wrap=True)
    return [sample for sample in samples if _relative(sample.image, config.root) not in bad]


def _problems(
    samples: Sequence[Sample], missing: Mapping[Path, str], root: str, run: Path, console: Console
) -> tuple[list[list[str]], bool]:
    """[image, reason] pairs, and whether they come from the run's stamp. They come from a new check if there is no
    stamp or the files have changed."""
    stamp, digest = run / STAMP, _digest(samples, root)
    known = read_stamp(stamp)
    if known.get("files") == digest:
        return known["problems"], True
    if known:
        console.print("[yellow]the images have changed since this run last checked them")
    with progress_bar(console) as bar:
        task = bar.add_task("checking images")
        found = check_samples(
            samples, os.cpu_count() or 1, lambda _, done, total: bar.update(task, completed=done, total=total), missing
        )
    problems = [[_relative(problem.image, root), problem.reason] for problem in found if not problem.doubtful]
    if doubts := [problem.reason for problem in found if problem.doubtful]:
        told = f"[yellow]{len(doubts)} masks are doubtful[/] (`adpretrain check-data` lists all): {escape(doubts[0])}"
        console.print(told, highlight=False, soft_wrap=True)
    with atomic_path(stamp) as temporary:
        temporary.write_text(json.dumps({"files": digest, "problems": problems}), encoding="utf-8")
    return problems, False


def _digest(samples: Sequence[Sample], root: str) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        for file in (sample.image, *sample.mask_files):
            state = file.stat() if file.exists() else None
            facts = [_relative(file, root), sample.defect, sample.split]
            digest.update(json.dumps([*facts, state and (state.st_size, state.st_mtime_ns)]).encode())
    return digest.hexdigest()


def _relative(file: Path, root: str) -> str:
    return os.path.relpath(file, root)


def read_stamp(stamp: Path) -> dict[str, Any]:
    """The content of a JSON file that a run wrote for resuming; empty if it is missing or damaged."""
    try:
        return json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing or damaged
        return {}


def held_out_names(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The categories that ``patterns`` ("p09*") match. Raises ValueError for a pattern that matches none."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"held-out category {pattern!r} matches none of: {', '.join(names)}")
    return {name for pattern in patterns for name in fnmatch.filter(names, pattern)}


def split_samples(samples: Sequence[Sample], patterns: Sequence[str]) -> tuple[list[Sample], list[Sample]]:
    """(training, held-out) samples; ``patterns`` are category names or patterns such as "p09*".

    A benchmark's own validation split is in neither.
    """
    samples = [sample for sample in samples if sample.split != "validation"]
    held = held_out_names(sorted({sample.category for sample in samples}), patterns)
    return [s for s in samples if s.category not in held], [s for s in samples if s.category in held]


def samples_of_shards(shards: Shards, patterns: Sequence[str], main: bool) -> tuple[list[Sample], list[Sample]]:
    """(a few normal photographs of every product, the held-out samples, in the first process only) as files.

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
    """data.root. A Hub repository is pinned to its commit at the start of the run, for all processes and every
    resumption. Raises ValueError if it cannot be reached."""
    root, stamp = config.data.root, Path(config.run) / COMMITS
    if not root.startswith(HUB):
        return root
    found = from_first(_commit(root, stamp) if main else "", dist.group.WORLD)
    if isinstance(found, ValueError):
        raise found
    return found


def _commit(root: str, stamp: Path) -> str | ValueError:
    """The root at its commit, or the error, which would leave the other processes waiting if it were raised here."""
    begun = stamp.with_name("config.yaml").exists()  # a start that failed earlier does not count
    known = read_stamp(stamp) if begun else {}
    try:
        if root not in known:
            known[root] = pinned(root)
            with atomic_path(stamp) as temporary:
                temporary.write_text(json.dumps(known), encoding="utf-8")
    except ValueError as error:
        return ValueError(str(error))  # without its cause, which cannot be sent to other processes
    return known[root]


def find_samples(
    config: PretrainConfig, console: Console, main: bool
) -> tuple[Shards | None, list[Sample], list[Sample]]:
    """(the shards if the set is streamed, training samples, held-out samples)."""
    if config.data.name == SHARDS:
        shards = Shards(root_of_run(config, main))
        return shards, *samples_of_shards(shards, config.data.held_out, main)
    checked = checked_samples(config.data, Path(config.run), console, main)
    return None, *split_samples(checked, config.data.held_out)


def held_out_products(samples: Sequence[Sample], shots: int, console: Console) -> dict[str, list[Sample]]:
    """The held-out samples by product, without products that cannot be scored, which are printed: a product needs
    normal and defective images besides its ``shots`` references.

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
        told = f"held out, but not scored because normal or defective images are missing: {', '.join(bare)}"
        console.print(told, style="yellow", markup=False, soft_wrap=True)
    return {name: group for name, group in products.items() if name not in bare}


def training_set(
    config: PretrainConfig, shards: Shards | None, samples: Sequence[Sample], preprocess: Preprocess
) -> PretrainingSet | StreamedSet:
    """The training images.

    Raises ValueError for a set without any defect: both losses separate anomalous from normal tokens, and without
    anomalies only the norm loss is left, which shrinks all features alike.
    """
    seed = config.cache.seed if config.cache.draws else config.seed
    shots = config.shots if config.matching != "none" else [0]
    common = (preprocess, shots, seed, config.augment)
    data: PretrainingSet | StreamedSet
    if shards is not None:
        data = StreamedSet(shards, *common, config.data.reservoir_mb << 20, config.data.reduced)
    else:
        data = PretrainingSet(samples, *common, config.references, config.data.reduced)
    if not data.defects:
        raise ValueError(
            f"the {len(data)} training images of {config.data.root} show no defect: the losses need anomalies, and "
            "would only shrink the features of normal ones; give a set with marked defects (data.root), or hold fewer "
            "categories out (data.held_out)"
        )
    return data


def step_batches(
    data: PretrainingSet | StreamedSet, config: PretrainConfig, start: int, stop: int, rank: int, processes: int
) -> StepBatches | StreamedBatches:
    """The batches of one process for the steps from ``start`` to ``stop``."""
    size = config.optim.batch_size
    if isinstance(data, StreamedSet):
        return StreamedBatches(data, size, start, stop, rank, processes)
    return StepBatches(len(data), size, start, stop, config.seed, rank, processes, data.draws.blocks)


def normal_images(
    data: PretrainingSet | StreamedSet, config: PretrainConfig, rank: int, processes: int
) -> tuple[PretrainingSet | StreamedSet, Iterable[list[Any]], int]:
    """The normal images of a set, without augmentation and with `CENTER_SHOTS` references each (or the largest of
    ``shots``, if lower); one process's batches of them, and the number of batches (of a stream, at most so many)."""
    shots, size = [min(CENTER_SHOTS, max(data.shots))], config.optim.batch_size
    if isinstance(data, StreamedSet):
        coming = StreamedSet(data.shards, data.preprocess, shots, data.seed, "none", config.data.reservoir_mb << 20)
        epoch = StreamedBatches(coming, size, 0, 0, rank, processes).per_epoch
        stream = StreamedBatches(coming, size, 0, epoch, rank, processes)
        return coming, ([draw for draw in draws if draw.row.normal] for draws in stream), epoch
    normal = [sample for sample in data.samples if not sample.anomalous]
    plain = PretrainingSet(normal, data.preprocess, shots, data.seed, "none", config.references)
    keys = [(0, index) for block in plain.draws.blocks(0) for index in block]
    own = [keys[start : start + size] for start in range(0, len(keys), size)][rank::processes]
    return plain, own, len(own)
