"""What one pretraining image needs: its views, its mask, and K normal references of its category and camera view.

Unmarked views of defective parts (`Sample.of_defective_part`) are no pretraining images and nobody's references. The
authors' released code draws its references from good parts alone too.

Everything random derives from (seed, epoch, index), so any step of a run can be repeated alone.

Shapes: V views (2, or 1 without augmentation), S side in pixels, H x W tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from adpretrain.config import ReferencesConfig
from adpretrain.data.samples import Sample, load_mask, to_learn_from
from adpretrain.photographs import picture_size, read_image
from adpretrain.preprocess import Preprocess, TwoViews
from adpretrain.training.draws import SHUFFLE, VIEWS, ReferenceDraws, generator
from adpretrain.training.loader import ImageBatch, Item, Request, assemble

AUGMENTATIONS = ("epoch", "once", "none")


def draw_views(image: Image.Image, two_views: TwoViews, augment: str, seed: int, epoch: int, index: int) -> Tensor:
    """A photograph's views in one epoch: uint8 [V, 3, S, S]."""
    if augment == "none":
        return two_views.preprocess.pixels(image)[None]
    moment = epoch if augment == "epoch" else 0
    return two_views(image, int(generator(seed, moment, index, VIEWS).integers(2**62)))


class PretrainingSet:
    """Pretraining samples with their references; what a step needs is loaded by `load`.

    K is drawn per image from ``shots`` (ADPretrain Tab. 13: Rand(1, 4, 8)); the references are distinct normal images
    of the same category and view, never the image itself. ``references``: how the draws of different images are tied
    together. ``reduced``: JPEG files are decoded near the size that is needed. The attribute ``samples`` is without the
    unmarked views of defective parts.

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

    def draw_references(self, index: int, epoch: int) -> list[int]:
        """Indices of the K references of one image in one epoch."""
        return self.draws.draw(index, epoch)

    def _picture(self, index: int) -> Image.Image:
        return read_image(self.samples[index].image, self.side)

    def pixels(self, index: int) -> Tensor:
        """The image without augmentation: uint8 [3, S, S]."""
        return self.preprocess.pixels(self._picture(index))

    def views(self, index: int, epoch: int) -> Tensor:
        """The image's views: uint8 [V, 3, S, S]."""
        return draw_views(self._picture(index), self.two_views, self.augment, self.seed, epoch, index)

    def mask(self, index: int) -> Tensor:
        """bool [S, S]."""
        sample = self.samples[index]
        return load_mask(sample, picture_size(sample.image) if sample.mask is not None else (0, 0), self.preprocess)

    def load(self, request: Request) -> ImageBatch:
        """The images of a step, as `adpretrain.training.loader` asks for them; keys are (epoch, index)."""
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

    Every epoch is one seeded permutation of all images, cut into global batches (the incomplete last one is
    dropped), of which each process has a consecutive part. A resumed run starts at any step without replaying the
    others. ``blocks``: of an epoch, lists of images that stay side by side, every image once; without it each image
    stands alone.
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


LABELS = ("center", "nearest", "pixels")


def token_labels(masks_BSS: Tensor, grid: tuple[int, int], rule: str = "center", pixels: int = 32) -> Tensor:
    """Pixel masks -> bool token labels [B, H, W]. The paper only says that masks are downsampled; the ``rule``:

    "center": the pixel at the centre of the token's patch is marked (torch's "nearest-exact"). "nearest": the pixel at
    its top left corner is, which torch calls "nearest" (the released norm loss). "pixels": more than ``pixels`` marked
    pixels lie in the patch, counted as at 224 px (the released angle loss).

    Raises ValueError for an unknown rule.
    """
    masks = masks_BSS[:, None].float()
    if rule == "pixels":
        share = F.adaptive_avg_pool2d(masks, grid)[:, 0]
        # The margin is for rounding: exactly ``pixels`` of a 14 x 14 patch come out a little above in float32.
        return share * (224 * 224 / (grid[0] * grid[1])) > pixels + 1e-3
    if rule not in LABELS:
        raise ValueError(f"token label rule {rule!r} is unknown; choose one of {', '.join(LABELS)}")
    return F.interpolate(masks, size=grid, mode="nearest-exact" if rule == "center" else "nearest")[:, 0] > 0
