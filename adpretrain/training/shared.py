"""Large tensors that the processes of one machine fill together and hold once.

They are mapped from a file that has no name any more once all have opened it, so that nothing is left behind.
"""

from __future__ import annotations

import math
import os
import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from adpretrain.training.distributed import Group, everyone, processes


@dataclass(frozen=True)
class LocalProcesses:
    """The processes of this machine: this one is ``rank`` of ``count``, by default alone.

    ``group``: those of all machines, which wait for each other here. ``folder`` takes the file, called after ``first``,
    the lowest rank of this machine in the group.
    """

    rank: int = 0
    count: int = 1
    first: int = 0
    folder: Path = Path()
    group: Group = None

    def share(self, total: int) -> range:
        """This process's part of ``total`` items; the parts of the machine's processes make up the whole."""
        return range(self.rank, total, self.count)

    def everywhere(self, fact: bool) -> bool:
        """Whether it holds in all processes of the group. All have come here when this returns."""
        return all(holds for (holds,) in everyone([int(fact)], self.group))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in the memory of all processes of this machine; all of the group must ask for one at a time.

        Raises OSError if the folder has no room for it, or is not the same one for the machine's processes.
        """
        if self.count == 1:
            self.everywhere(True)  # other machines may have several, which wait twice
            self.everywhere(True)
            return torch.empty(*shape, dtype=dtype)
        path = self.folder / f".shared.{self.first}.tmp"  # as `adpretrain.files.sweep` knows them
        if self.rank == 0:
            _make(path, math.prod(shape) * dtype.itemsize)
        self.everywhere(True)
        path.stat()  # torch would make the file where it is missing
        tensor = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(*shape)
        self.everywhere(True)
        if self.rank == 0:
            path.unlink()
        return tensor


ALONE = LocalProcesses()


def local_processes(folder: Path, group: Group) -> LocalProcesses:
    """Those of this machine, told by its name and network address; all processes of the group must ask together."""
    if group is None:
        return ALONE
    machines: list[tuple[str, int] | None] = [None] * processes(group)
    here = socket.gethostname(), uuid.getnode()
    dist.all_gather_object(machines, here, group)
    ranks = [rank for rank, machine in enumerate(machines) if machine == here]
    return LocalProcesses(ranks.index(dist.get_rank(group)), len(ranks), ranks[0], folder, group)


def _make(path: Path, size: int) -> None:
    """A file of ``size`` bytes whose room on the disk is taken: to find it full at a later write kills a process."""
    path.unlink(missing_ok=True)  # of a process that was killed
    with path.open("wb") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            path.unlink()
            raise OSError(error.errno, f"{error.strerror} ({size >> 20} MiB are needed)", str(path)) from error
