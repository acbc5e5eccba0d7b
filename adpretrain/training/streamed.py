"""Pretraining images streamed from shards; no process holds or reads the whole set.

The items are those of `adpretrain.training.dataset.PretrainingSet`, with one difference. There the K references of an
image are any normal photographs of its category and camera view; here they come from this process's *reservoir*. At the
start of every epoch the reservoir has the photographs set aside for it (different ones in every process); then it holds
the latest normal ones of the process's share of the stream. With many processes a share is small, so the same few
references return more often within an epoch; the shares are dealt anew every epoch.

The main process of a rank reads and draws; loader workers decode. Random numbers derive from (seed, epoch, rank) for
the order and from (seed, epoch, image) for the rest, whatever the number of workers. A resumed run reads its epoch
again from the start without decoding, which costs at most one share of bytes (see `StreamedBatches`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adpretrain.data.shards import Photograph, Shards
from adpretrain.photographs import picture_size, read_image, read_mask
from adpretrain.preprocess import Preprocess, TwoViews
from adpretrain.training.dataset import HEAD, REFERENCES, ROWS, SHARDS, draw_views, generator, refuse_short
from adpretrain.training.loader import ImageBatch, Item, Request, assemble

T = TypeVar("T")
BUFFER = 4  # 1 / BUFFER of the reservoir's bytes shuffles the stream


@dataclass(frozen=True)
class Draw:
    """One image of a step with its references, not yet decoded."""

    epoch: int
    row: Photograph
    references: list[Photograph]


class StreamedSet:
    """Turns the `Draw`s of a step into its images, as `PretrainingSet` does; an image's index is `Photograph.index`.

    ``reservoir``: bytes of encoded photographs that a process may hold; ``reduced`` as in `PretrainingSet`. Raises
    ValueError if the reservoir is too small, or if a category and view has too few normal photographs, or too few that
    are set aside, for the largest K.
    """

    def __init__(
        self,
        shards: Shards,
        preprocess: Preprocess,
        shots: Sequence[int],
        seed: int,
        augment: str = "epoch",
        reservoir: int = 2 << 30,
        reduced: bool = False,
    ) -> None:
        self.shards, self.preprocess, self.shots = shards, preprocess, list(shots)
        self.seed, self.augment = seed, augment
        self.side = preprocess.shorter_side if reduced else None
        self.two_views = TwoViews(preprocess)
        self.draws = None  # references change with the stream, so their features are not kept
        index, needed = shards.index, max(shots) + 1  # the image itself is never its own reference
        refuse_short(sorted(group for group, count in index.normals.items() if count < needed), shots, needed)
        if index.references < needed:
            raise ValueError(
                f"K = {max(shots)} references need {needed} photographs of every category and view set aside; "
                f"{shards.root} has {index.references}: write the shards with --references {needed} or lower shots"
            )
        # Every photograph is counted as the largest of its group, so that the limit holds for any order.
        self.buffer = max(1, reservoir // BUFFER // index.longest)  # rows
        row_of_groups = sum(index.largest.values())
        self.capacity = (reservoir - self.buffer * index.longest) // row_of_groups - needed  # photographs of a group
        if self.capacity < needed:
            least = (2 * needed * row_of_groups * BUFFER // (BUFFER - 1) + index.longest >> 20) + 1
            raise ValueError(
                f"data.reservoir_mb {reservoir >> 20} cannot hold {2 * needed} photographs of each of "
                f"{len(index.largest)} categories and views: give at least {least}"
            )

    def __len__(self) -> int:
        """The number of images in the training shards."""
        return sum(self.shards.index.files[name]["rows"] for name in self.shards.names("train"))

    @property
    def defects(self) -> int:
        return len(self) - sum(self.shards.index.normals.values())

    @property
    def categories(self) -> set[str]:
        return set(self.shards.index.categories)

    def digest(self) -> str:
        """A digest of the shards that does not depend on their folder."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self.shards.index)).encode()).hexdigest()

    def load(self, request: Request) -> ImageBatch:
        """The images of a step; ``request.keys`` are its draws."""
        photographs = {row.key: row for draw in request.keys for row in draw.references}
        items = [self._item(draw) for draw in request.keys]
        return assemble(items, lambda key: self.preprocess.pixels(self._picture(photographs[key])))

    def _item(self, draw: Draw) -> Item:
        row = draw.row
        views = draw_views(self._picture(row), self.two_views, self.augment, self.seed, draw.epoch, row.index)
        return Item((draw.epoch, row.index), views, self._mask(row), tuple(other.key for other in draw.references))

    def _picture(self, row: Photograph) -> Image.Image:
        full_scale = self.shards.index.full_scales.get(row.group)
        try:
            return read_image(io.BytesIO(row.image), self.side, full_scale=full_scale)
        except ValueError as error:
            raise ValueError(f"{row.key!r} in {self.shards.root} is no image: {error.__cause__ or error}") from error

    def _mask(self, row: Photograph) -> Tensor:
        if row.mask is None:
            return torch.zeros(self.preprocess.image_size, self.preprocess.image_size, dtype=torch.bool)
        mask, size = read_mask(io.BytesIO(row.mask)), picture_size(io.BytesIO(row.image))
        if mask.size != size:
            raise ValueError(f"{row.key!r} in {self.shards.root}: the mask is of {mask.size} pixels, not {size}")
        return self.preprocess.mask(mask)


class Reservoir:
    """The last ``capacity`` normal photographs of every category and view; it starts with those of ``head``."""

    def __init__(self, head: Iterable[Photograph], capacity: int) -> None:
        self.pools: dict[str, deque[Photograph]] = defaultdict(lambda: deque(maxlen=capacity))
        for row in head:
            self.add(row)

    def add(self, row: Photograph) -> None:
        pool = self.pools[row.group]
        if row.normal and all(other.key != row.key for other in pool):
            pool.append(row)

    def draw(self, row: Photograph, shots: Sequence[int], rng: np.random.Generator) -> list[Photograph]:
        """K distinct photographs of the row's group, never the row itself."""
        others = [other for other in self.pools[row.group] if other.key != row.key]
        return [others[i] for i in rng.choice(len(others), size=int(rng.choice(shots)), replace=False)]


class StreamedBatches:
    """The batches of one process from ``start`` to ``stop`` (steps of the whole run), as lists of `Draw`.

    Every epoch the shards are dealt to the processes in another order; a process mixes the rows of its shards in a
    bounded buffer. All processes make ``per_epoch`` steps, as many as the smallest share has batches; the remaining
    rows (less than a batch, and one row for each of a process's shards) are dropped in that epoch. Starting inside an
    epoch requires reading the share up to that step.

    Raises ValueError if the shards cannot be dealt evenly or a share is smaller than a batch.
    """

    def __init__(
        self, data: StreamedSet, batch_size: int, start: int, stop: int, rank: int = 0, processes: int = 1
    ) -> None:
        self.data, self.batch_size, self.start, self.stop = data, batch_size, start, stop
        self.rank, self.processes = rank, processes
        self.names = data.shards.names("train")
        count = len(self.names)
        if count % processes:
            fitting = [n for n in range(1, count + 1) if count % n == 0]
            raise ValueError(
                f"{count} shards cannot be dealt to {processes} processes: start one of {fitting} or write a multiple"
            )
        smallest = sorted(data.shards.index.files[name]["rows"] for name in self.names)
        self.per_epoch = sum(smallest[: count // processes]) // batch_size
        if not self.per_epoch:
            raise ValueError(
                f"a batch of {batch_size} images exceeds a process's share of {len(data)} images on {processes}"
            )

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Draw]]:
        return read_ahead(self._batches())

    def _batches(self) -> Iterator[list[Draw]]:
        head = list(self._head())
        step = self.start
        while step < self.stop:
            epoch, done = divmod(step, self.per_epoch)
            count = min(self.per_epoch - done, self.stop - step)
            yield from islice(self._epoch(epoch, done, Reservoir(head, self.data.capacity)), count)
            step += count

    def _head(self) -> Iterator[Photograph]:
        """As many photographs of every group as the largest K needs, different ones in every process."""
        index, needed, chosen = self.data.shards.index, max(self.data.shots) + 1, {}
        for number, (group, count) in enumerate(sorted(index.normals.items())):
            order = generator(self.data.seed, self.rank, number, HEAD).permutation(min(count, index.references))
            chosen[group] = set(order[:needed].tolist())
        seen: dict[str, int] = defaultdict(int)
        for row in map(self._checked, self.data.shards.rows(self.data.shards.names("references"))):
            if seen[row.group] in chosen[row.group]:
                yield row
            seen[row.group] += 1

    def _epoch(self, epoch: int, done: int, reservoir: Reservoir) -> Iterator[list[Draw]]:
        """The batches of an epoch except the first ``done``, whose rows are only read."""
        seed, shots, rows = self.data.seed, self.data.shots, self._rows(epoch)
        for position in range(self.per_epoch):
            batch = []
            for row in islice(rows, self.batch_size):
                if position >= done:
                    rng = generator(seed, epoch, row.index, REFERENCES)
                    batch.append(Draw(epoch, row, reservoir.draw(row, shots, rng)))
                reservoir.add(row)
            if position >= done:
                yield batch

    def _rows(self, epoch: int) -> Iterator[Photograph]:
        order = generator(self.data.seed, epoch, SHARDS).permutation(len(self.names))
        rows = self.data.shards.rows([self.names[i] for i in order], self.rank, self.processes)
        rng = generator(self.data.seed, epoch, self.rank, ROWS)
        return mix(map(self._checked, rows), self.data.buffer, rng)

    def _checked(self, row: Photograph) -> Photograph:
        """The row, if its group and size agree with the index, from which the reservoir's limit was computed."""
        index = self.data.shards.index
        if (
            row.size > (index.largest.get(row.group, 0) if row.normal else index.longest)
            or row.group not in index.largest
        ):
            raise ValueError(f"{row.key!r} in {self.data.shards.root} is not in its index.json: write the shards again")
        return row


def mix(rows: Iterable[T], size: int, rng: np.random.Generator) -> Iterator[T]:
    """``rows``, shuffled in a buffer of ``size`` rows."""
    held: list[T] = []
    for row in rows:
        if len(held) < size:
            held.append(row)
            continue
        place = int(rng.integers(size))
        yield held[place]
        held[place] = row
    yield from (held[i] for i in rng.permutation(len(held)))


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, while a thread reads the next one, so that pauses of the network do not stop the training."""
    end = object()
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = reader.submit(next, items, end)
            yield item  # type: ignore[misc]
