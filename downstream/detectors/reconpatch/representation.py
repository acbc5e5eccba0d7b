"""A linear map of patch embeddings, trained on one product's normal images (ReConPatch Sec. 3.2).

f maps patch embeddings to the representation; g projects it only for the loss. Their slow twins f-bar and g-bar
(Eq. 8) give the similarities of patches with which f and g are trained by the relaxed contrastive loss (`similarity`).

Shapes: n images, H x W patches of an image, N patches of a step, D channels of an embedding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from adpretrain.progress import Progress
from downstream.detectors.reconpatch.similarity import SCALES, relaxed_contrastive_loss, similarity
from downstream.roi import RegionOfInterest

KEPT_BATCH = 16  # batch size of embeddings that are kept


@dataclass(frozen=True)
class RepresentationConfig:
    """How f and g are trained. The defaults are those of the paper; values that it does not give are marked [ours].

    Args:
        dim: channels of f, the representation: 512, or 384 in the paper's ensemble at 320 pixels.
        projection_dim: channels of g [ours: as many as f]; null = no g, the loss is computed on f (Table S4).
        neighbours: k of Eq. 2 to 5.
        alpha: weight of the pairwise similarity, Eq. 6.
        sigma: bandwidth of Eq. 1, in the unit set by ``scale`` [ours].
        scale: "mean", "unit" or "none", see `similarity.scale_embeddings` [ours; the paper: "none", sigma not given].
        margin: m of Eq. 7.
        momentum: gamma of Eq. 8 [ours].
        epochs: number of passes over the normal images: 120, or 60 in the paper's ensemble at 320 pixels.
        learning_rate: initial rate of AdamP, which decays to 0 along a cosine: 1e-5, or 1e-6 in the paper's ensembles
            and at 480 pixels. The paper takes thousands of steps; a few dozen images, with a few hundred, need 1e-3.
        weight_decay: weight decay of AdamP.
        images_per_step: number of images whose patches are used together in a step [ours].
        patches_per_step: N, the number of patches drawn from these images, or all if there are fewer [ours]. Time and
            memory of a step grow with its square.
        seed: random seed of the initial weights, the order of the images and the choice of patches.
    """

    dim: int = 512
    projection_dim: int | None = 512
    neighbours: int = 5
    alpha: float = 0.5
    sigma: float = 1.0
    scale: Literal["mean", "unit", "none"] = "mean"
    margin: float = 1.0
    momentum: float = 0.999
    epochs: int = 120
    learning_rate: float = 1e-5
    weight_decay: float = 1e-2
    images_per_step: int = 4
    patches_per_step: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one = ("dim", "neighbours", "images_per_step", "patches_per_step")
        for name in (*at_least_one, *(["projection_dim"] if self.projection_dim is not None else [])):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("alpha", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must be in 0..1")
        for name in ("sigma", "margin", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")
        for name in ("epochs", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")
        if self.neighbours > self.patches_per_step:
            raise ValueError(f"neighbours {self.neighbours} exceed patches_per_step {self.patches_per_step}")
        if self.scale not in SCALES:
            raise ValueError(f"scale {self.scale!r} is unknown; choose one of {', '.join(SCALES)}")


class Representation(nn.Module):
    """f, g and their twins: linear layers without bias, because a bias would cancel in every distance.

    They are initialised as random (semi-)orthogonal matrices [ours]: f then preserves lengths in the subspace that it
    keeps, and all distances if ``dim`` is at least D.
    """

    def __init__(self, width: int, config: RepresentationConfig) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        self.f = _orthogonal(width, config.dim, generator)
        self.g: nn.Module = nn.Identity()
        if config.projection_dim is not None:
            self.g = _orthogonal(config.dim, config.projection_dim, generator)
        self.slow_f, self.slow_g = copy.deepcopy(self.f), copy.deepcopy(self.g)
        self.slow_f.requires_grad_(False)
        self.slow_g.requires_grad_(False)

    def forward(self, patches_ND: Tensor) -> Tensor:
        """f(p), the representation: [..., D] -> [..., dim]."""
        return self.f(patches_ND)

    def project(self, patches_ND: Tensor) -> Tensor:
        """g(f(p)), for the loss: [N, D] -> [N, projection_dim]."""
        return self.g(self.f(patches_ND))

    def project_slowly(self, patches_ND: Tensor) -> Tensor:
        """g-bar(f-bar(p)), for the similarities: [N, D] -> [N, projection_dim], without gradients."""
        with torch.no_grad():
            return self.slow_g(self.slow_f(patches_ND))

    @torch.no_grad()
    def update_twin(self, momentum: float) -> None:
        """Eq. 8: twin <- momentum x twin + (1 - momentum) x network."""
        for fast, slow in ((self.f, self.slow_f), (self.g, self.slow_g)):
            for ours, theirs in zip(fast.parameters(), slow.parameters(), strict=True):
                theirs.lerp_(ours, 1 - momentum)


def _orthogonal(width: int, dim: int, generator: torch.Generator) -> nn.Linear:
    layer = torch.nn.utils.skip_init(nn.Linear, width, dim, bias=False)  # draws nothing from the global generator
    start = torch.nn.init.orthogonal_(torch.empty(dim, width, dtype=torch.float64), generator=generator)
    layer.weight.data.copy_(start)
    return layer


class NormalPatches:
    """Embeddings of the normal images, which are kept if they fit in ``cache_bytes``, else computed in every epoch.

    ``read`` returns an iterator of embeddings, batches of [b, H, W, D]; ``repeatable`` says whether it can be called
    more than once. Kept images are shuffled in every epoch; otherwise they come in the order in which they are read
    (use a shuffling DataLoader). Only patches in the ``region`` of interest are trained on.

    Raises ValueError if the embeddings are too large to keep but can be read only once.
    """

    def __init__(
        self,
        read: Callable[[], Iterable[Tensor]],
        cache_bytes: int = 2 << 30,
        repeatable: bool = True,
        progress: Progress | None = None,
        region: RegionOfInterest | None = None,
    ) -> None:
        self.read, self.region = read, region
        self.kept: list[Tensor] | None = []
        self.batch_sizes: list[int] = []
        size = 0
        for maps in read():
            self.width, self.device = int(maps.shape[-1]), maps.device
            self.batch_sizes.append(len(maps))
            size += maps.nbytes
            if size <= cache_bytes and self.kept is not None:
                self.kept.extend(maps)
            elif repeatable:
                self.kept = None
            else:
                raise ValueError(
                    f"the embeddings of {self.images} images exceed cache_bytes {cache_bytes}, and an iterator cannot "
                    "be read again in every epoch: give a list or a DataLoader, or more cache_bytes"
                )
            if progress is not None:
                progress("embedding normal images", self.images, 0)

    @property
    def images(self) -> int:
        """Number of images read, n after the first pass."""
        return sum(self.batch_sizes)

    def maps(self) -> Iterable[Tensor]:
        """Return the embeddings of all images, in the order of the batches: [b, H, W, D]."""
        if self.kept is None:
            return self.read()
        starts = range(0, self.images, KEPT_BATCH)
        return (torch.stack(self.kept[start : start + KEPT_BATCH]) for start in starts)

    def steps_per_epoch(self, images_per_step: int) -> int:
        sizes = [self.images] if self.kept is not None else self.batch_sizes
        return sum(math.ceil(size / images_per_step) for size in sizes)

    def steps(self, config: RepresentationConfig, epoch: int) -> Iterator[Tensor]:
        """Yield the patches [N, D] of every step of an epoch, drawn from seed, epoch and step."""
        for step, (numbers, maps_BHWD) in enumerate(self._groups(config, epoch)):
            inside_BHW = self.region and self.region.pick(numbers).inside(maps_BHWD[..., 0])
            patches_ND = maps_BHWD.flatten(0, 2) if inside_BHW is None else maps_BHWD[inside_BHW]
            if len(patches_ND) > config.patches_per_step:
                drawn = np.random.default_rng([config.seed, epoch, step]).permutation(len(patches_ND))
                chosen = torch.from_numpy(drawn[: config.patches_per_step].copy())
                patches_ND = patches_ND[chosen.to(patches_ND.device)]
            yield patches_ND

    def _groups(self, config: RepresentationConfig, epoch: int) -> Iterator[tuple[Sequence[int], Tensor]]:
        """The images of every step, their numbers and embeddings."""
        if self.kept is None:
            count = 0
            for group in (group for maps in self.read() for group in maps.split(config.images_per_step)):
                yield range(count, count + len(group)), group
                count += len(group)
            return
        order = np.random.default_rng([config.seed, epoch]).permutation(self.images).tolist()
        for start in range(0, self.images, config.images_per_step):
            numbers = order[start : start + config.images_per_step]
            yield numbers, torch.stack([self.kept[image] for image in numbers])


def train_representation(
    model: Representation, patches: NormalPatches, config: RepresentationConfig, progress: Progress | None = None
) -> list[float]:
    """Train f and g in place, with AdamP and a cosine schedule, and return the mean loss of every epoch.

    AdamP suits this loss, which does not depend on the scale of f and g: it removes from a step the part that would
    only scale. ``progress(what, done, total)`` is called after every step. Raises ValueError for a loss not finite.
    """
    from timm.optim import AdamP  # timm takes a second to import, and only training needs it

    per_epoch = patches.steps_per_epoch(config.images_per_step)
    total = per_epoch * config.epochs
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = AdamP(weights, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, total))
    losses: list[float] = []
    for epoch in range(config.epochs):
        summed = torch.zeros((), device=weights[0].device)
        for step, patches_ND in enumerate(patches.steps(config, epoch)):
            loss = training_loss(model, patches_ND, config)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            model.update_twin(config.momentum)
            summed += loss.detach()
            if progress is not None:
                progress("training the representation", epoch * per_epoch + step + 1, total)
        losses.append(float(summed) / per_epoch)
        if not math.isfinite(losses[-1]):
            raise ValueError(
                f"the loss of epoch {epoch + 1} is {losses[-1]}: lower learning_rate {config.learning_rate}"
            )
    return losses


def training_loss(model: Representation, patches_ND: Tensor, config: RepresentationConfig) -> Tensor:
    """Compute Eq. 7 for a batch, in float32 even under autocast, with gradients for f and g."""
    with torch.enable_grad(), torch.autocast(patches_ND.device.type, enabled=False):
        slow = model.project_slowly(patches_ND)
        alike = similarity(slow, config.neighbours, config.alpha, config.sigma, config.scale)
        return relaxed_contrastive_loss(model.project(patches_ND), alike, config.margin)
