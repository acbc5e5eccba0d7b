"""Which normal photographs are the references of an image: a function of (seed, epoch, index) alone.

Whatever the options, the K references of an image are, over epochs, uniformly drawn among all K-subsets of the other
normal photographs of its category and camera view. The options only tie the draws of different images together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from adpretrain.config import ReferencesConfig
from adpretrain.data.samples import Sample

# Streams of random numbers that pretraining draws from; the last part of a generator's key.
SHUFFLE, REFERENCES, VIEWS, SHARDS, ROWS, HEAD, BLOCKS, POOL = range(8)


def generator(*key: int) -> np.random.Generator:
    """The random numbers of a key such as (seed, epoch, index, stream)."""
    return np.random.default_rng(np.random.SeedSequence(key))


def refuse_short(short: Sequence[str], shots: Sequence[int], needed: int) -> None:
    """Raise ValueError that names the groups with fewer normal images than the largest K needs, if there are any."""
    if short:
        raise ValueError(
            f"K = {max(shots)} references need {needed} normal images in every category and view; too few in "
            f"{', '.join(short[:5])}{' ...' if len(short) > 5 else ''}: lower shots {list(shots)} or add images"
        )


class ReferenceDraws:
    """Draws of references among the normal images of a category and view (a *group*; groups are numbered).

    Raises ValueError if a group has too few normal images for the largest K.
    """

    def __init__(
        self, samples: Sequence[Sample], shots: Sequence[int], seed: int, config: ReferencesConfig | None = None
    ) -> None:
        self.shots, self.seed, self.config = list(shots), seed, config or ReferencesConfig()
        members: dict[tuple[str, str], list[int]] = defaultdict(list)
        for index, sample in enumerate(samples):
            members[sample.category, sample.view or ""].append(index)
        self.members = [members[name] for name in sorted(members)]  # of every group
        self.normals = [[i for i in group if not samples[i].anomalous] for group in self.members]
        self.group_of = {index: number for number, group in enumerate(self.members) for index in group}
        self._check([" ".join(name).strip() for name in sorted(members)])
        self._blocks: tuple[int, list[list[int]], dict[int, list[int]]] | None = None

    def _check(self, names: Sequence[str]) -> None:
        largest, together = max(self.shots), self.config.together
        needed = largest + together  # the images of a block are no references of theirs
        short = [name for name, normals in zip(names, self.normals, strict=True) if len(normals) < needed]
        refuse_short(short, self.shots, needed)

    def blocks(self, epoch: int) -> list[list[int]]:
        """Every image once; those of a block share their references in this epoch and come one after the other."""
        if self.config.together == 1:
            return [[index] for index in range(len(self.group_of))]
        return self._shared(epoch)[0]

    def _shared(self, epoch: int) -> tuple[list[list[int]], dict[int, list[int]]]:
        if self._blocks is None or self._blocks[0] != epoch:
            blocks, size = [], self.config.together
            for number, group in enumerate(self.members):
                mixed = generator(self.seed, epoch, number, BLOCKS).permutation(group).tolist()
                blocks += [mixed[start : start + size] for start in range(0, len(mixed), size)]
            self._blocks = (epoch, blocks, {index: block for block in blocks for index in block})
        return self._blocks[1:]

    def pool(self, group: int, epoch: int) -> list[int]:
        """The normal images of a group that may be references in this epoch."""
        normals, size = self.normals[group], self.config.pool
        if not 0 < size < len(normals):
            return normals
        rng = generator(self.seed, epoch // self.config.refresh, group, POOL)
        return rng.choice(normals, size, replace=False).tolist()

    def draw(self, index: int, epoch: int) -> list[int]:
        """The K distinct references of one image in one epoch, never the image itself; K is drawn from ``shots``."""
        block = [index] if self.config.together == 1 else self._shared(epoch)[1][index]
        rng = generator(self.seed, epoch, block[0], REFERENCES)
        pool = [other for other in self.pool(self.group_of[index], epoch) if other not in block]
        return [pool[i] for i in rng.choice(len(pool), size=int(rng.choice(self.shots)), replace=False)]
