"""A linear map of patch embeddings, trained on one product's normal images: ReConPatch Sec. 3.2.

f turns patch embeddings into the representation that is kept, g projects it for the loss alone. Their slow twins
f-bar and g-bar (Eq. 8) say which patches are alike; f and g follow the relaxed contrastive loss (`similarity`).

Shapes: n images, H x W patches of an image, N patches of a step, D channels of an embedding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from downstream.coreset import Progress
from downstream.detectors.reconpatch.similarity import SCALES, relaxed_contrastive_loss, similarity

KEPT_BATCH = 16  # kept images handed out at once


@dataclass(frozen=True)
class RepresentationConfig:
    """How f and g are trained. The defaults are the paper's where it names a value; [ours] where it is silent.

    Args:
        dim: channels of f, the representation. 512; 384 in the ensemble at 320 pixels.
        projection_dim: channels of g [ours: those of f]; null = no g, the loss sees f itself (Table S4).
        neighbours: k of Eq. 2 to 5.
        alpha: weight of the pairwise similarity, Eq. 6.
        sigma: bandwidth of Eq. 1, in the unit that ``scale`` gives [ours].
        scale: "mean", "unit" or "none", see `similarity.scale_embeddings` [ours; the paper: "none", sigma not given].
        margin: m of Eq. 7.
        momentum: gamma of Eq. 8 [ours].
        epochs: times that every normal image is seen. 120; 60 in the ensemble at 320 pixels.
        learning_rate: of AdamP, falling to 0 along a cosine, step by step. 1e-5; 1e-6 in ensembles and at 480 pixels.
            The paper's sets take thousands of steps; a few hundred, of a few dozen images, need about 1e-3.
        weight_decay: of AdamP.
        images_per_step: images whose patches may meet in a step [ours].
        patches_per_step: N, drawn from them at random; all of them if they are fewer [ours]. Time and memory of a
            step grow with its square.
        seed: of the first weights, the order of the images and the choice of patches.
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
    """f, g and their twins: linear layers without a bias, which would cancel in every distance.

    All start as random (semi-)orthogonal matrices [ours]: before the first step f shrinks no direction that it keeps,
    and where ``dim`` is at least D it changes no distance at all.
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
        """f: what the detector keeps. [..., D] -> [..., dim]."""
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
    layer = torch.nn.utils.skip_init(nn.Linear, width, dim, bias=False)  # nothing drawn from the global generator
    start = torch.nn.init.orthogonal_(torch.empty(dim, width, dtype=torch.float64), generator=generator)
    layer.weight.data.copy_(start)
    return layer


class NormalPatches:
    """Embeddings of the normal images, kept where they fit in ``cache_bytes``, else computed anew every epoch.

    ``read``: starts reading the embeddings, batches of [b, H, W, D]; ``repeatable``: whether it may be called more than
    once. Kept images come in a new order every epoch; images that are computed anew come in the order they are read
    (a shuffling DataLoader changes it).

    Raises ValueError if there are too many to keep and they can be read only once.
    """

    def __init__(
        self,
        read: Callable[[], Iterable[Tensor]],
        cache_bytes: int = 2 << 30,
        repeatable: bool = True,
        progress: Progress | None = None,
    ) -> None:
        self.read = read
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
        """n, as far as they were read."""
        return sum(self.batch_sizes)

    def maps(self) -> Iterable[Tensor]:
        """All images in the order of the batches: [b, H, W, D]."""
        if self.kept is None:
            return self.read()
        starts = range(0, self.images, KEPT_BATCH)
        return (torch.stack(self.kept[start : start + KEPT_BATCH]) for start in starts)

    def steps_per_epoch(self, images_per_step: int) -> int:
        sizes = [self.images] if self.kept is not None else self.batch_sizes
        return sum(math.ceil(size / images_per_step) for size in sizes)

    def steps(self, config: RepresentationConfig, epoch: int) -> Iterator[Tensor]:
        """The patches [N, D] of every step of an epoch; they derive from the seed, the epoch and the step."""
        for step, images in enumerate(self._groups(config, epoch)):
            patches_ND = images.flatten(0, 2)
            if len(patches_ND) > config.patches_per_step:
                drawn = np.random.default_rng([config.seed, epoch, step]).permutation(len(patches_ND))
                chosen = torch.from_numpy(drawn[: config.patches_per_step].copy())
                patches_ND = patches_ND[chosen.to(patches_ND.device)]
            yield patches_ND

    def _groups(self, config: RepresentationConfig, epoch: int) -> Iterator[Tensor]:
        if self.kept is None:
            for maps in self.read():
                yield from maps.split(config.images_per_step)
            return
        order = np.random.default_rng([config.seed, epoch]).permutation(self.images).tolist()
        for start in range(0, self.images, config.images_per_step):
            yield torch.stack([self.kept[image] for image in order[start : start + config.images_per_step]])


def train_representation(
    model: Representation, patches: NormalPatches, config: RepresentationConfig, progress: Progress | None = None
) -> list[float]:
    """Train f and g in place, with AdamP and a cosine schedule. Returns the mean loss of every epoch.

    AdamP suits this loss: it does not change when f or g is scaled, and AdamP takes out of a step the part that would
    only scale. ``progress(what, done, total)`` is told every step. Raises ValueError if the loss is not finite.
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
    """Eq. 7 of a batch, in float32 whatever the autocast state, with gradients for f and g."""
    with torch.enable_grad(), torch.autocast(patches_ND.device.type, enabled=False):
        slow = model.project_slowly(patches_ND)
        alike = similarity(slow, config.neighbours, config.alpha, config.sigma, config.scale)
        return relaxed_contrastive_loss(model.project(patches_ND), alike, config.margin)
