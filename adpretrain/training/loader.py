"""The images of pretraining steps, read by worker processes ahead of time and copied while the device computes.

Shapes: B images, V views, S side in pixels, P photographs of a unit.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True)
class ImageBatch:
    """The images of one step as 8-bit pixels, a quarter of the bytes of the networks' input.

    ``views``: uint8 [B, V, 3, S, S]; ``masks``: bool [B, S, S]; ``keys``: (epoch, index) of each image; ``sets``: (n,
    names of references) for each run of n consecutive images that share references, sorted by the numbers of references
    and images; ``units``: names of photographs and their pixels, uint8 [P, 3, S, S], to be encoded together;
    ``forget``: names of features to drop. The masks stay on the host, where labels are counted without waiting.
    """

    views: Tensor
    masks: Tensor
    keys: list[tuple[int, int]]
    sets: list[tuple[int, tuple[Hashable, ...]]]
    units: list[tuple[list[Hashable], Tensor]]
    forget: list[Hashable]

    def _each(self, change: Callable[[Tensor], Tensor]) -> ImageBatch:
        units = [(names, change(pixels)) for names, pixels in self.units]
        return replace(self, views=change(self.views), units=units)

    def pin_memory(self) -> ImageBatch:
        """The batch in pinned memory, from which a GPU copies by itself; the DataLoader calls this."""
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device) -> ImageBatch:
        """The batch with its pixels on ``device``."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))


class Item(NamedTuple):
    """One image of a step: (epoch, index), views uint8 [V, 3, S, S], mask bool [S, S], names of its references."""

    key: tuple[int, int]
    views: Tensor
    mask: Tensor
    references: tuple[Hashable, ...]


@dataclass(frozen=True)
class Request:
    """The images that one step needs. ``keys``: its images, as the data set names them; ``pools``: groups whose pools
    are encoded and kept, or None if no features are kept; ``forget``: names of features to be dropped."""

    keys: list[Any]
    pools: list[int] | None = None
    forget: tuple[int, ...] = ()


def assemble(
    items: Sequence[Item],
    read: Callable[[Any], Tensor],
    units: Sequence[Sequence[Hashable]] | None = None,
    forget: Sequence[Hashable] = (),
) -> ImageBatch:
    """Items -> a batch; each reference is read once. Images with the same references lie side by side, and so do sets
    with equal numbers of references and images, which can be matched together.

    ``units``: photographs to read instead of the items' references.
    """
    first: dict[tuple[Hashable, ...], int] = {}
    for position, item in enumerate(items):
        first.setdefault(item.references, position)
    images = Counter(item.references for item in items)
    ordered = sorted(items, key=lambda item: (len(item.references), images[item.references], first[item.references]))
    if units is None:
        units = [list(dict.fromkeys(chain.from_iterable(item.references for item in ordered)))]
    return ImageBatch(
        views=torch.stack([item.views for item in ordered]),
        masks=torch.stack([item.mask for item in ordered]),
        keys=[item.key for item in ordered],
        sets=[(len(list(same)), chosen) for chosen, same in groupby(ordered, key=lambda item: item.references)],
        units=[(list(unit), torch.stack([read(name) for name in unit])) for unit in units if unit],
        forget=list(forget),
    )


class _Loads(Dataset[ImageBatch]):
    def __init__(self, load: Callable[[Request], ImageBatch]) -> None:
        self.load = load

    def __getitem__(self, request: Request) -> ImageBatch:
        return self.load(request)


def load_ahead(
    load: Callable[[Request], ImageBatch], requests: Iterable[Request], workers: int, device: torch.device
) -> Iterator[ImageBatch]:
    """Call ``load`` for each of ``requests`` and yield the batches on ``device``. Each of ``workers`` processes reads
    two batches ahead; with 0 workers this process reads."""
    loader = DataLoader(
        _Loads(load),
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
    )
    batches = _until_exit(loader)
    if device.type == "cuda" and torch.cuda.is_available():
        return _copied_ahead(batches, device)
    return (batch.to(device) for batch in batches)


def _start_worker(worker: int) -> None:
    """Start a worker, which ignores requests to stop. A terminal, SLURM or a launcher sends them to all processes, but
    only the training process reacts: it finishes its step, and workers end when it tells them or is gone."""
    for request in (signal.SIGINT, signal.SIGTERM):
        signal.signal(request, signal.SIG_IGN)
    threading.Thread(target=_end_without_trainer, daemon=True).start()


def _end_without_trainer() -> None:
    # torch watches the parent's process id for this, but that may be the fork server's.
    trains = multiprocessing.parent_process()
    assert trains is not None
    trains.join()
    os._exit(1)


def _until_exit(loader: DataLoader[ImageBatch]) -> Iterator[ImageBatch]:
    """The loader's batches. Its workers are ended when no more are requested. If this process exits in between, they
    are ended before Python sends them a request to stop, which they ignore, and waits for them."""
    batches = iter(loader)
    end = getattr(batches, "_shutdown_workers", lambda: None)  # without workers there is nothing to end
    atexit.register(end)  # registered after torch's and Python's handlers, so it runs first
    try:
        yield from batches
    finally:
        atexit.unregister(end)
        end()


def _copied_ahead(batches: Iterable[ImageBatch], device: torch.device) -> Iterator[ImageBatch]:
    """The batches on ``device``, each yielded while the next one is copied."""
    copies, ready = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(copies):
            coming = batch.to(device)
        if ready is not None:
            yield ready
        work = torch.cuda.current_stream(device)
        work.wait_stream(copies)
        # The memory belongs to the copying stream, which must not reuse it before this one is done.
        for tensor in (coming.views, *(pixels for _, pixels in coming.units)):
            tensor.record_stream(work)
        ready = coming
    if ready is not None:
        yield ready
