"""What is fitted on what, and scored on what: the protocols of ADPretrain Sec. 4 and ReConPatch Tab. 4, as lists of
trials.

  full                   every normal training image (Tab. 1)
  few-shot               K of them, for each K (Tab. 5)
  sample-efficiency      a share of them, 10 % in the paper (Tab. 3a)
  contamination          all of them and test anomalies, 0.1 per normal image, as if they were normal (Tab. 3b); the
                         references are drawn from this set too, anomalies among them: whoever took the anomalies for
                         normal would do so
  reference-sensitivity  as full, with several draws of the extractor's references (Tab. 4)
  multi-class            one detector for all products
  robustness             as full, scored as photographed and again with turned, shifted, relit and blurred images
                         (ReConPatch Tab. 4; `perturbation`)

A product is a category, or one camera view of it where a set has views. Everything random derives from the number of
the draw; nothing is ever chosen by looking at a score.

Perturbed images are as another camera would have taken them (ReConPatch Tab. 4, suppl. C.1): turned by up to 5 degrees,
shifted by up to 1 % of the side, brightness and contrast changed by up to 30 %, blurred with sigma .1 to 1. Where the
paper is silent [ours]: every image gets all of them, evenly drawn; they act on the network's input, in this order;
what comes in at the border is the picture mirrored, as black corners would be a defect of their own; and only the
images that are scored are changed, so the detector meets what it has never seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adpretrain.data import ImageDataset, Sample
from adpretrain.data.products import by_product, normals, queries
from adpretrain.preprocess import Preprocess
from adpretrain.references import random_references
from downstream.evaluation.board import PROTOCOLS as PROTOCOLS
from downstream.evaluation.board import ProtocolOptions
from downstream.maps import gaussian_blur

PERTURBED = "perturbed images"
EVERYTHING = "all products"
HELD_OUT = 5  # where a set has no test split, every fifth normal image is one
FROM_TEST = "no normal images but the test split's: those learnt from are of it, and are not scored"
NO_TEST_SPLIT = (
    f"no test split: every {HELD_OUT}th normal image is held out (Real-IAD's own lists, which published numbers use: "
    "--split realiad_jsons)"
)


@dataclass(frozen=True)
class Part:
    """One product's share of a trial: what is learnt from, the extractor's references, what is scored.

    ``notes`` are for the reader of its numbers; ``reference_notes`` only where the features use the references.
    ``perturbed``: seed of the changes of the images to score; None = as they were photographed.
    """

    product: str
    train: tuple[Sample, ...]
    references: tuple[Sample, ...]
    test: tuple[Sample, ...]
    notes: tuple[str, ...] = ()
    reference_notes: tuple[str, ...] = ()
    perturbed: int | None = None


@dataclass(frozen=True)
class Trial:
    """One detector is fitted on the training images of all parts (one part, but for multi-class) and scores each.

    ``setting`` names the protocol's variant, such as "K=4"; ``draw`` counts what was drawn anew. With
    ``only_references`` the draws differ in the references alone, which raw features do not use.
    """

    name: str
    setting: str
    draw: int
    parts: tuple[Part, ...]
    only_references: bool = False

    @property
    def images(self) -> int:
        """How many images are read, a measure of its time."""
        return sum(len(part.train) + len(part.test) for part in self.parts)


def trials(samples: Sequence[Sample], options: ProtocolOptions) -> list[Trial]:
    """Every trial of a protocol. Raises ValueError naming the products that have too few images for it."""
    products = by_product(samples)
    if not products:
        raise ValueError("no samples: nothing can be evaluated")
    if options.protocol == "few-shot":
        _check_pools(products, max(options.shots))
    if options.protocol == "multi-class":
        return [
            Trial(
                EVERYTHING,
                "multi-class",
                draw,
                tuple(_part(name, group, options, options.seed + draw) for name, group in products.items()),
            )
            for draw in range(options.repeats)
        ]
    settings: Sequence[int | None] = options.shots if options.protocol == "few-shot" else (None,)
    only_references = options.protocol in ("full", "reference-sensitivity")
    found = [
        Trial(
            name,
            _setting(options, shots),
            draw,
            (_part(name, group, options, options.seed + draw, shots),),
            only_references,
        )
        for name, group in products.items()
        for shots in settings
        for draw in range(1 if shots == 0 else options.repeats)
    ]
    if options.protocol == "robustness":  # the maps shown are the last setting's: those that lie on the photographs
        return [each for trial in found for each in (_perturbed(trial, options.seed), trial)]
    return found


def _perturbed(trial: Trial, seed: int) -> Trial:
    parts = [replace(part, perturbed=seed + trial.draw, notes=(*part.notes, SAID)) for part in trial.parts]
    return replace(trial, setting=PERTURBED, parts=tuple(parts))


def _check_pools(products: Mapping[str, Sequence[Sample]], shots: int) -> None:
    pools = {name: len(normals(group)) for name, group in products.items()}
    if small := [f"{name} ({pool})" for name, pool in pools.items() if pool < shots]:
        raise ValueError(
            f"too few normal images for K = {shots} references: {', '.join(small)}; choose smaller numbers of images K "
            "(--shots), or leave these products out (--products)"
        )


def _setting(options: ProtocolOptions, shots: int | None) -> str:
    if shots is not None:
        return f"K={shots or 'all'}"
    return {
        "sample-efficiency": f"{100 * options.share:g} % of the training images",
        "robustness": "as photographed",
        "contamination": f"noise {options.noise:g}, in the references too, {'' if options.overlap else 'no '}overlap",
    }.get(options.protocol, options.protocol)


def split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Normal training images and images to score. Where a set has no test split, every fifth normal image is held out.

    Raises ValueError if one of the two is empty.
    """
    pool = normals(samples)
    if not any(sample.split == "test" for sample in samples):
        pool = [index for position, index in enumerate(pool) if position % HELD_OUT != HELD_OUT - 1]
    elif all(samples[index].split == "test" for index in pool):
        raise ValueError("there are no normal images but the test split's: there is nothing to fit on")
    if not pool:
        raise ValueError("there are no normal images to fit on")
    return [samples[index] for index in pool], [samples[index] for index in queries(samples, pool)]


def _part(product: str, group: Sequence[Sample], options: ProtocolOptions, seed: int, shots: int | None = None) -> Part:
    try:
        if shots:  # everything but the K may be scored
            pool = normals(group)
            chosen = [pool[index] for index in random_references(len(pool), shots, seed)]
            train = [group[index] for index in chosen]
            test = [group[index] for index in queries(group, chosen)]
            own = (FROM_TEST,) if any(sample.split == "test" for sample in train) else ()
            return Part(product, tuple(train), tuple(train), tuple(test), own)
        train, test = split(group)
    except ValueError as error:
        raise ValueError(f"{product}: {error}") from error
    notes: tuple[str, ...] = () if any(sample.split == "test" for sample in group) else (NO_TEST_SPLIT,)
    if options.protocol == "sample-efficiency":
        train = _some(train, max(1, round(options.share * len(train))), seed)
    elif options.protocol == "contamination":
        train, test, fewer = _contaminated(train, test, options, seed)
        notes += fewer
    if shots == 0:
        return Part(product, tuple(train), tuple(train), tuple(test), notes)
    references = _some(train, min(options.references, len(train)), seed)
    told: tuple[str, ...] = ()
    if len(references) < options.references:
        told = (f"{len(references)} references instead of {options.references}: there are no more training images",)
    if wrong := sum(sample.anomalous for sample in references):
        told += (f"{wrong} references are anomalies, drawn with the contaminated training images",)
    return Part(product, tuple(train), tuple(references), tuple(test), notes, told)


def _some(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    return [samples[index] for index in random_references(len(samples), count, seed)]


def _contaminated(
    train: list[Sample], test: list[Sample], options: ProtocolOptions, seed: int
) -> tuple[list[Sample], list[Sample], tuple[str, ...]]:
    """Test anomalies join the training images; without overlap they are no longer scored."""
    anomalies = [sample for sample in test if sample.anomalous]
    wanted = round(options.noise * len(train))
    count = min(wanted, len(anomalies) // 2)
    moved = _some(anomalies, count, seed) if count else []
    notes = () if count == wanted else (f"{count} anomalies instead of {wanted}: half of the product's",)
    if not options.overlap:
        gone = {sample.image for sample in moved}
        test = [sample for sample in test if sample.image not in gone]
    # Mixed in, so that no detector meets all anomalies at the end.
    mixed = [*train, *moved]
    order = np.random.default_rng(seed).permutation(len(mixed))
    return [mixed[index] for index in order], test, notes


ANGLE, SHIFT, LIGHT, SIGMA = 5.0, 0.01, 0.3, (0.1, 1.0)
SAID = (
    f"the scored images were turned by up to {ANGLE:g} degrees, shifted by up to {SHIFT:.0%} of the side, changed in "
    f"brightness and contrast by up to {LIGHT:.0%} and blurred with sigma {SIGMA[0]:g} to {SIGMA[1]:g} pixels"
)


@dataclass(frozen=True)
class Perturbation:
    """One image's change: ``angle`` in degrees, counter-clockwise; ``shift`` to the right and down, in sides;
    ``brightness`` and ``contrast`` as factors; ``sigma`` of the blur in pixels."""

    angle: float
    shift: tuple[float, float]
    brightness: float
    contrast: float
    sigma: float

    @classmethod
    def draw(cls, seed: int, index: int) -> Perturbation:
        """The change of image ``index`` in draw ``seed``."""
        rng = np.random.default_rng([seed, index])
        angle, (right, down) = rng.uniform(-ANGLE, ANGLE), rng.uniform(-SHIFT, SHIFT, 2)
        brightness, contrast = rng.uniform(1 - LIGHT, 1 + LIGHT, 2)
        return cls(float(angle), (float(right), float(down)), float(brightness), float(contrast), rng.uniform(*SIGMA))

    def picture(self, pixels_3SS: Tensor) -> Tensor:
        """RGB in 0..1 -> the same, changed."""
        moved = self._moved(pixels_3SS, "bilinear")
        lit = (moved * self.brightness).clamp(0, 1)
        gray = (lit * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0).mean()
        return gaussian_blur((gray + self.contrast * (lit - gray)).clamp(0, 1), self.sigma)

    def mask(self, mask_SS: Tensor) -> Tensor:
        """Where the defect is then: bool [S, S]."""
        return self._moved(mask_SS[None].float(), "nearest")[0] > 0.5

    def _moved(self, values_CSS: Tensor, mode: str) -> Tensor:
        sine, cosine = math.sin(math.radians(self.angle)), math.cos(math.radians(self.angle))
        turn = torch.tensor([[cosine, -sine], [sine, cosine]])  # from a place to the place that it came from
        back = -2 * turn @ torch.tensor(self.shift)  # the image is 2 wide
        grid = F.affine_grid(torch.cat([turn, back[:, None]], 1)[None], [1, *values_CSS.shape], align_corners=False)
        return F.grid_sample(values_CSS[None], grid, mode, padding_mode="reflection", align_corners=False)[0]


class PerturbedImages(ImageDataset):
    """An `ImageDataset` whose images and masks are changed, each in its own way, drawn from (seed, index)."""

    def __init__(self, samples: Sequence[Sample], preprocess: Preprocess, seed: int) -> None:
        super().__init__(samples, preprocess)
        self.seed = seed

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, change = super().__getitem__(index), Perturbation.draw(self.seed, index)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.preprocess.mean, self.preprocess.std))
        picture = change.picture(item["image"] * std + mean)
        return {**item, "image": (picture - mean) / std, "mask": change.mask(item["mask"])}
