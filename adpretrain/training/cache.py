"""A cache of the residuals of a pretraining set, computed once before training.

The processes of one machine fill the cache together and share one copy: its tensors are mapped from a file that is
unlinked once all have opened it, so that nothing is left behind.

Shapes: V views, L levels, C channels, H x W tokens, D reference draws, n images.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from adpretrain.backbones import FeatureMaps
from adpretrain.extractor import ADExtractor
from adpretrain.files import atomic_path
from adpretrain.saved import save_tensors
from adpretrain.training.batches import ResidualBatch, encode
from adpretrain.training.dataset import PretrainingSet
from adpretrain.training.distributed import Group, everyone, processes


@dataclass(frozen=True)
class LocalProcesses:
    """The processes of this machine, of which this one is ``rank`` of ``count`` (by default it is alone).

    ``group``: the processes of all machines, which wait for each other here. ``folder`` holds the shared file, named
    after ``first``, the lowest rank of this machine in the group.
    """

    rank: int = 0
    count: int = 1
    first: int = 0
    folder: Path = Path()
    group: Group = None

    def share(self, total: int) -> range:
        """This process's part of ``total`` items, which are divided among the processes of the machine."""
        return range(self.rank, total, self.count)

    def everywhere(self, fact: bool) -> bool:
        """Whether ``fact`` holds in all processes of the group. Returns only after all of them have called it."""
        return all(holds for (holds,) in everyone([int(fact)], self.group))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in memory shared by the processes of this machine; all of the group must call this together.

        Raises OSError if the folder has no room for it, or is not the same folder for all processes of the machine.
        """
        if self.count == 1:
            self.everywhere(True)  # machines with several processes wait twice
            self.everywhere(True)
            return torch.empty(*shape, dtype=dtype)
        path = self.folder / f".shared.{self.first}.tmp"  # a name that `adpretrain.files.sweep` deletes
        if self.rank == 0:
            _make(path, math.prod(shape) * dtype.itemsize)
        self.everywhere(True)
        path.stat()  # raises if it is missing, where torch would make it
        tensor = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(*shape)
        self.everywhere(True)
        if self.rank == 0:
            path.unlink()
        return tensor


ALONE = LocalProcesses()


def local_processes(folder: Path, group: Group) -> LocalProcesses:
    """The processes with this machine's name and network address; all of the group must call this together."""
    if group is None:
        return ALONE
    machines: list[tuple[str, int] | None] = [None] * processes(group)
    here = socket.gethostname(), uuid.getnode()
    dist.all_gather_object(machines, here, group)
    ranks = [rank for rank, machine in enumerate(machines) if machine == here]
    return LocalProcesses(ranks.index(dist.get_rank(group)), len(ranks), ranks[0], folder, group)


def _make(path: Path, size: int) -> None:
    """Make a file of ``size`` bytes and reserve its disk space: a full disk at a later write would kill a process."""
    path.unlink(missing_ok=True)  # left by a killed process
    with path.open("wb") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            path.unlink()
            raise OSError(error.errno, f"{error.strerror} ({size >> 20} MiB are needed)", str(path)) from error


class CachedBatches:
    """Residuals of every image against D reference draws, computed once and kept in memory (half precision).

    Epoch e uses draw e mod D. The views of an image stay the same (augment "once" or "none"), so a step computes only
    the projector, which makes it possible to pretrain a small one on a CPU. ``folder`` keeps the cache on disk for the
    next run with the same images and settings. ``threads`` images are prepared at a time. If a machine has several
    processes (``local``), each computes its share of the images, and all map the result.
    """

    def __init__(
        self,
        extractor: ADExtractor,
        data: PretrainingSet,
        device: torch.device,
        draws: int,
        folder: str = "",
        threads: int = 1,
        track: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,
        local: LocalProcesses = ALONE,
    ) -> None:
        self.data, self.device, self.draws = data, device, draws
        self.views = 1 if data.augment == "none" else 2
        path = Path(folder) / f"residuals-{self._fingerprint(extractor)}.safetensors" if folder else None
        stored = _load(path) if path is not None else None
        if not local.everywhere(stored is not None) or stored is None:
            stored = self._compute(extractor, threads, track, local)
            if path is not None and local.rank == 0:
                with atomic_path(path) as temporary:
                    save_tensors(stored, temporary)
        self.levels = [stored[f"level_{level}"] for level in range(len(extractor.channels))]  # [n, D, V, C, H, W]
        self.masks = stored["masks"]

    def _fingerprint(self, extractor: ADExtractor) -> str:
        """A digest of images (path, size, time, full scale), backbone, local scale, matching and draws."""
        digest = hashlib.sha256()
        files = [
            (str(s.image), s.image.stat().st_size, s.image.stat().st_mtime_ns, s.full_scale) for s in self.data.samples
        ]
        data = [self.data.shots, self.data.seed, self.data.augment, self.draws, extractor.config.matching]
        network = extractor.backbone
        backbone: list[Any] = [network.name, extractor.preprocess.to_dict(), network.levels, network.revision]
        backbone += [network.finest, network.patch]
        digest.update(json.dumps([files, data, backbone]).encode())
        if network.revision is None:  # local or random weights: compare every bit
            for parameter in network.parameters():
                plain = parameter.detach().cpu().contiguous(memory_format=torch.contiguous_format).flatten()
                digest.update(plain.view(torch.uint8).numpy().tobytes())
        if extractor.local_scale is not None:
            digest.update(repr(extractor.local_scale.config).encode())
            digest.update(extractor.local_scale.single.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _compute(self, extractor: ADExtractor, threads: int, track: Any, local: LocalProcesses) -> dict[str, Tensor]:
        def fill(compute: Callable[[int], list[Tensor]]) -> list[Tensor]:
            """The results of ``compute`` for all images, stacked; each process computes those of its share."""
            own = local.share(len(self.data))
            with ThreadPoolExecutor(threads) as pool:
                rows = iter(track(pool.map(compute, own), len(own)))
                first = next(rows, None)
                like = compute(0) if first is None else first  # more processes than images
                whole = [local.empty((len(self.data), *part.shape), part.dtype) for part in like]
                for row, index in zip(chain([like], rows), own, strict=False):
                    for stacked, part in zip(whole, row, strict=True):
                        stacked[index] = part
            local.everywhere(True)
            return whole

        plain = fill(lambda index: self._encode(extractor, index))
        *levels, masks = fill(lambda index: [*self._match(extractor, plain, index), self.data.mask(index)])
        return {**{f"level_{number}": level for number, level in enumerate(levels)}, "masks": masks}

    @torch.no_grad()
    def _encode(self, extractor: ADExtractor, index: int) -> list[Tensor]:
        """L levels [C, H, W] of one image."""
        return [level[0].cpu() for level in encode(extractor, self.data.pixels(index)[None].to(self.device))]

    @torch.no_grad()
    def _match(self, extractor: ADExtractor, plain: FeatureMaps, index: int) -> list[Tensor]:
        """L levels [D, V, C, H, W] of one image."""
        views = [level[index : index + 1] for level in plain]
        if self.data.augment != "none":
            views = encode(extractor, self.data.views(index, epoch=0).to(self.device))
        views = [level.to(self.device) for level in views]
        draws = []
        for draw in range(self.draws):
            references = self.data.draw_references(index, draw)
            bank = extractor.bank_of([level[list(references)].to(self.device) for level in plain])
            draws.append(bank.residuals(views))
        return [torch.stack(level).half().cpu() for level in zip(*draws, strict=True)]

    def __call__(self, steps: Iterable[list[tuple[int, int]]]) -> Iterator[ResidualBatch]:
        for keys in steps:
            rows = torch.tensor([index for _, index in keys])
            draw = torch.tensor([epoch % self.draws for epoch, _ in keys])
            chosen = [level[rows, draw].to(self.device, torch.get_default_dtype()) for level in self.levels]
            views = [[level[:, view] for level in chosen] for view in range(self.views)]
            yield ResidualBatch(views, self.masks[rows], keys, [])


def _load(path: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None
