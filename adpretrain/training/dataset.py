"""The pretraining images, each with its views, its mask, and K normal references of its category and camera view.

Over epochs, the K references of an image are uniformly drawn among all K-subsets of the other normal photographs of its
category and view; the options of `adpretrain.config.ReferencesConfig` only tie the draws of different images together.

Unmarked views of defective parts (`Sample.of_defective_part`) are neither pretraining images nor references. The
authors' released code also draws its references from good parts alone.

All random numbers derive from (seed, epoch, index), so any step of a run can be repeated alone.

Shapes: V views (2, or 1 without augmentation), S side in pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
from PIL import Image
from torch import Tensor

from adpretrain.config import ReferencesConfig
from adpretrain.data.samples import Sample, load_mask, to_learn_from
from adpretrain.photographs import picture_size
from adpretrain.preprocess import Preprocess, TwoViews
from adpretrain.training.loader import ImageBatch, Item, Request, assemble

# Streams of random numbers for pretraining: the last part of a generator's key.
SHUFFLE, REFERENCES, VIEWS, SHARDS, ROWS, HEAD, BLOCKS, POOL = range(8)
AUGMENTATIONS = ("epoch", "once", "none")


def generator(*key: int) -> np.random.Generator:
    """The random generator of a key such as (seed, epoch, index, stream)."""
    return np.random.default_rng(np.random.SeedSequence(key))


def refuse_short(short: Sequence[str], shots: Sequence[int], needed: int) -> None:
    """Raise ValueError that names the groups in ``short``, which have fewer normal images than the largest K needs."""
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
        needed = largest + together  # the images of a block cannot be its references
        short = [name for name, normals in zip(names, self.normals, strict=True) if len(normals) < needed]
        refuse_short(short, self.shots, needed)

    def blocks(self, epoch: int) -> list[list[int]]:
        """Blocks of images that share references in this epoch and stay consecutive; every image is in one block."""
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


class Requests:
    """The requests of some steps while the features of ``room`` pools are kept and the least recently used are dropped.

    Which features a step will find is computed beforehand, so that workers read only images that must be encoded.
    Raises ValueError if a step needs more than ``room`` pools.
    """

    def __init__(self, steps: Iterable[list[tuple[int, int]]], draws: ReferenceDraws, room: int) -> None:
        self.steps, self.draws, self.room = steps, draws, room

    def __iter__(self) -> Iterator[Request]:
        held: dict[int, int] = {}  # group -> epoch in which its pool was encoded; the least recently used first
        for keys in self.steps:
            yield self._request(keys, held)

    def _request(self, keys: list[tuple[int, int]], held: dict[int, int]) -> Request:
        draws = self.draws
        wanted = {draws.group_of[index]: epoch for epoch, index in keys}
        if len(wanted) > self.room:
            raise ValueError(
                f"a batch with images of {len(wanted)} categories and views needs their pools at once, but "
                f"references.cache_mb has room for {self.room}: raise it, or lower references.pool or the batch size"
            )
        refresh, pools, dropped = draws.config.refresh, [], []
        for group, epoch in wanted.items():
            encoded = held.pop(group, None)
            if encoded is None or encoded // refresh != epoch // refresh:
                pools.append(group)
                if encoded is not None:
                    dropped.append((group, encoded))
                encoded = epoch
            held[group] = encoded
        while len(held) > self.room:
            group = next(iter(held))
            dropped.append((group, held.pop(group)))
        return Request(keys, pools, tuple(chain.from_iterable(draws.pool(*key) for key in dropped)))


def draw_views(image: Image.Image, two_views: TwoViews, augment: str, seed: int, epoch: int, index: int) -> Tensor:
    """A photograph's views in one epoch: uint8 [V, 3, S, S]."""
    if augment == "none":
        return two_views.preprocess.pixels(image)[None]
    moment = epoch if augment == "epoch" else 0
    return two_views(image, int(generator(seed, moment, index, VIEWS).integers(2**62)))


class PretrainingSet:
    """Pretraining samples with their references; `load` reads the images of a step.

    K is drawn per image from ``shots`` (ADPretrain Tab. 13: Rand(1, 4, 8)); the references are distinct normal images
    of the same category and view, never the image itself. ``references``: how images share draws. ``reduced``: JPEG
    files are decoded near the size that is needed. The attribute ``samples`` excludes unmarked views of defective
    parts.

    Raises ValueError if a category's view has too few normal images for the largest K, or a defect has no mask.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        preprocess: Preprocess,
        shots: Sequence[int],
        seed: int,
        augment: str = "epoch",
        references: ReferencesConfig | None = None,
        reduced: bool = False,
    ) -> None:
        if augment not in AUGMENTATIONS:
            raise ValueError(f"augment {augment!r} is unknown; choose one of {AUGMENTATIONS}")
        self.samples, self.preprocess, self.shots = to_learn_from(samples), preprocess, list(shots)
        self.seed, self.augment = seed, augment
        self.side = preprocess.shorter_side if reduced else None
        self.two_views = TwoViews(preprocess)
        for sample in self.samples:
            if sample.anomalous and sample.mask is None:
                raise ValueError(f"{sample.image} is a defect without a mask: its defect would be learnt as normal")
        self.draws = ReferenceDraws(self.samples, shots, seed, references)

    @property
    def defects(self) -> int:
        return sum(sample.anomalous for sample in self.samples)

    @property
    def categories(self) -> set[str]:
        return {sample.category for sample in self.samples}

    def digest(self) -> str:
        """A digest of the images and their order, from which batches are drawn, and of their full scales, if any; it
        does not depend on their folder."""
        facts = [
            (s.category, s.defect, s.view, s.split, s.image.name, *filter(None, [s.full_scale])) for s in self.samples
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def draw_references(self, index: int, epoch: int) -> list[int]:
        """Indices of the K references of one image in one epoch."""
        return self.draws.draw(index, epoch)

    def _picture(self, index: int) -> Image.Image:
        return self.samples[index].read(self.side)

    def pixels(self, index: int) -> Tensor:
        """The image without augmentation: uint8 [3, S, S]."""
        return self.preprocess.pixels(self._picture(index))

    def views(self, index: int, epoch: int) -> Tensor:
        """The image's views: uint8 [V, 3, S, S]."""
        return draw_views(self._picture(index), self.two_views, self.augment, self.seed, epoch, index)

    def mask(self, index: int) -> Tensor:
        """The image's defect mask: bool [S, S]."""
        sample = self.samples[index]
        return load_mask(sample, picture_size(sample.image) if sample.mask is not None else (0, 0), self.preprocess)

    def load(self, request: Request) -> ImageBatch:
        """The images of a step that `adpretrain.training.loader` requests; keys are (epoch, index)."""
        items = [
            Item((epoch, index), self.views(index, epoch), self.mask(index), tuple(self.draw_references(index, epoch)))
            for epoch, index in request.keys
        ]
        epoch = request.keys[0][0]  # a batch never spans two epochs
        units = None if request.pools is None else [self.draws.pool(group, epoch) for group in request.pools]
        return assemble(items, self.pixels, units, request.forget)

    def __len__(self) -> int:
        return len(self.samples)


class StepBatches:
    """The batches of one process from ``start`` to ``stop`` (steps of the whole run), as lists of (epoch, index).

    Every epoch is one seeded permutation of all images, cut into global batches (the incomplete last one is dropped),
    of which each process has a consecutive part. A resumed run starts at any step without replaying the others.
    ``blocks`` gives an epoch's lists of images that stay side by side, every image once; without it no images do.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        start: int,
        stop: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        blocks: Callable[[int], list[list[int]]] | None = None,
    ) -> None:
        self.images, self.batch_size, self.global_batch, self.seed = images, batch_size, batch_size * processes, seed
        self.start, self.stop, self.rank, self.blocks = start, stop, rank, blocks
        if images < self.global_batch:
            raise ValueError(
                f"a batch of {self.global_batch} images over all processes exceeds the {images} of the set"
            )

    @property
    def per_epoch(self) -> int:
        """Steps per epoch."""
        return self.images // self.global_batch

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order: list[int] = []
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, self.per_epoch)
            if position == 0 or not order:
                order = self._order(epoch)
            first = position * self.global_batch + self.rank * self.batch_size
            yield [(epoch, index) for index in order[first : first + self.batch_size]]

    def _order(self, epoch: int) -> list[int]:
        blocks = self.blocks(epoch) if self.blocks is not None else [[index] for index in range(self.images)]
        mixed = generator(self.seed, epoch, SHUFFLE).permutation(len(blocks))
        return [index for number in mixed for index in blocks[number]]
