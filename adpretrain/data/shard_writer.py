"""Write a data set as Parquet shards, in the format that `adpretrain.data.shards` describes."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageChops

from adpretrain.data.samples import Sample, to_learn_from
from adpretrain.data.shards import COLUMNS, FORMAT, INDEX, Photograph, ShardIndex, group_name, schema
from adpretrain.extras import need
from adpretrain.files import atomic_folder
from adpretrain.photographs import read_mask

ROW_GROUP_BYTES = 16 << 20  # read and written at a time


def write_shards(
    samples: Sequence[Sample],
    out: str | Path,
    shards: int,
    held_out: Sequence[Sample] = (),
    references: int = 16,
    seed: int = 0,
    track: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,
) -> Path:
    """Write ``samples`` as ``shards`` files and return ``out``, which appears only when all is written.

    Unmarked views of defective parts are left out of the training shards.

    The files' bytes are copied without decoding (`adpretrain.data.checking` decodes them); several masks of one image
    become one PNG. ``references``: normal photographs of every category and view to set aside. Two row groups of
    `ROW_GROUP_BYTES` are in memory. ``track`` wraps the rows of all files.

    Raises ValueError as `check_target` does, or if an image is listed twice or a defect has no mask.
    """
    target, samples = Path(out), to_learn_from(samples)
    check_target(target, shards, len(samples))
    bare = [sample.image for sample in (*samples, *held_out) if sample.anomalous and not sample.mask_files]
    if bare:
        raise ValueError(f"{bare[0]} is a defect without a mask: its defect would be learnt as normal")
    root = Path(os.path.commonpath([os.path.abspath(sample.image.parent) for sample in (*samples, *held_out)]))
    parts = {f"data/train-{n:05d}-of-{shards:05d}.parquet": rows for n, rows in enumerate(deal(samples, shards, seed))}
    parts["data/references-00000-of-00001.parquet"] = choose_references(samples, references, seed)
    if held_out:
        parts["data/held_out-00000-of-00001.parquet"] = list(held_out)
    total = sum(map(len, parts.values()))
    counts = _Counts()
    with atomic_folder(target) as folder:
        (folder / "data").mkdir()
        done = iter(track(range(total), total))
        for name, chosen in parts.items():
            rows = (photograph(sample, root) for sample, _ in zip(chosen, done, strict=False))
            _write(folder / name, map(counts.add, rows) if "/train-" in name else rows)
        next(done, None)  # the bar ends
        files = {name: {"rows": len(rows), "bytes": (folder / name).stat().st_size} for name, rows in parts.items()}
        index = ShardIndex(
            FORMAT,
            seed,
            files,
            dict(counts.normals),
            dict(counts.largest),
            counts.longest,
            references,
            sorted({sample.category for sample in samples}),
            sorted({sample.category for sample in held_out}),
            {group_name(s.category, s.view): s.full_scale for s in (*samples, *held_out) if s.full_scale is not None},
        )
        (folder / INDEX).write_text(json.dumps(dataclasses.asdict(index), indent=1), encoding="utf-8")
    return target


def check_target(out: str | Path, shards: int, images: int) -> None:
    """Raise ValueError if ``out`` holds other files than shards, or if there are fewer images than shards."""
    target = Path(out)
    if target.exists() and any(target.iterdir()) and not (target / INDEX).is_file():
        raise ValueError(f"{target} holds other files than shards: choose another folder")
    if not 1 <= shards <= images:
        raise ValueError(f"{shards} shards for {images} images: choose a number in 1..{images}")


def deal(samples: Sequence[Sample], shards: int, seed: int) -> list[list[Sample]]:
    """Samples of every shard: each kind (category, view, defect) is shuffled and dealt, then each shard shuffled.

    The shards' sizes, and their numbers of any kind, differ by one at most.
    """
    rng = np.random.default_rng(np.random.SeedSequence((seed, 0)))
    kinds: dict[tuple[str, str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        kinds[sample.category, sample.view or "", sample.defect].append(sample)
    order = [kinds[kind][i] for kind in sorted(kinds) for i in rng.permutation(len(kinds[kind]))]
    parts = [order[start::shards] for start in range(shards)]
    return [[part[i] for i in rng.permutation(len(part))] for part in parts]


def choose_references(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """``count`` random normal photographs of every category and view, or all if there are fewer."""
    rng = np.random.default_rng(np.random.SeedSequence((seed, 1)))
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if not sample.anomalous:
            groups[group_name(sample.category, sample.view)].append(sample)
    return [groups[name][i] for name in sorted(groups) for i in rng.permutation(len(groups[name]))[:count]]


class _Counts:
    """The counts of training photographs for index.json."""

    def __init__(self) -> None:
        self.normals: dict[str, int] = defaultdict(int)
        self.largest: dict[str, int] = defaultdict(int)
        self.longest = 0
        self.keys: set[str] = set()

    def add(self, row: Photograph) -> Photograph:
        if row.key in self.keys:
            raise ValueError(f"{row.key} is in the set twice: every image must have its own path")
        self.keys.add(row.key)
        self.longest = max(self.longest, row.size)
        self.normals[row.group] += row.normal
        self.largest[row.group] = max(self.largest[row.group], row.size if row.normal else 0)
        return row


def photograph(sample: Sample, root: Path) -> Photograph:
    """A sample's row; the key is its path below ``root``."""
    key = Path(os.path.abspath(sample.image)).relative_to(root).as_posix()
    labels = (sample.category, sample.defect, sample.view, sample.split, sample.of_defective_part)
    return Photograph(sample.image.read_bytes(), _mask_bytes(sample), *labels, key)


def _mask_bytes(sample: Sample) -> bytes | None:
    if len(sample.mask_files) < 2:
        return sample.mask_files[0].read_bytes() if sample.mask_files else None
    buffer = io.BytesIO()
    reduce(ImageChops.lighter, map(read_mask, sample.mask_files)).save(buffer, "PNG")
    return buffer.getvalue()


def _write(path: Path, rows: Iterable[Photograph]) -> None:
    """Write one file, row group by row group, without compression or dictionaries, which do not help images."""
    need("datasets", "pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    options = {"compression": "none", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    with pq.ParquetWriter(path, schema(), **options) as writer:
        for group in _row_groups(rows):
            columns = {name: [getattr(row, name) for row in group] for name in COLUMNS}
            writer.write_table(pa.table(columns, schema()))


def _row_groups(rows: Iterable[Photograph]) -> Iterator[list[Photograph]]:
    group: list[Photograph] = []
    size = 0
    for row in chain(rows, [None]):
        if row is None or (group and size + row.size > ROW_GROUP_BYTES):
            if group:
                yield group
            group, size = [], 0
        if row is not None:
            group.append(row)
            size += row.size
