"""Protocols: which images detectors are fitted on and which they score, as lists of trials (ADPretrain Sec. 4 and
ReConPatch Tab. 4).

  full                   fit on every normal training image (Tab. 1)
  few-shot               fit on K of them, for each K (Tab. 5)
  sample-efficiency      fit on a share of them, 10 % in the paper (Tab. 3a)
  contamination          fit on all of them and on test anomalies, 0.1 per normal image, as if they were normal (Tab.
                         3b); the references are drawn from this set too, so that some of them are anomalies, as they
                         would be in practice if anomalies were taken for normal. Where the set's own training list is
                         contaminated (`Sample.noise`), that list is taken as it is instead. With K: the K images of
                         few-shot, of which a share (at least one) is replaced by anomalies
  reference-sensitivity  like full, with several draws of the extractor's references (Tab. 4)
  multi-class            one detector for all products
  robustness             like full, or with K like few-shot, scored on the images as photographed and again under
                         each change of `perturbations` alone and under those of ReConPatch Tab. 4 together
  shifted-line           like full, or with K like few-shot, but fitted on the first half of the normal images in the
                         order of their file names and scored on the second: what a line loses that drifts after the
                         references were taken. Names stand for time; where they do not, the numbers mean nothing

A product is a category, or one camera view of it if the data set has views. All randomness derives from the seed and
the number of the draw; nothing is ever chosen by looking at a score.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from adpretrain.data import Sample
from adpretrain.data.products import by_product, normals, queries
from adpretrain.references import random_references
from downstream.evaluation.perturbations import SETTINGS, Change
from downstream.evaluation.protocol_options import FEW, ProtocolOptions
from downstream.evaluation.protocol_options import PROTOCOLS as PROTOCOLS

PLAIN = "as photographed"
EVERYTHING = "all products"
HELD_OUT = 5  # if a data set has no test split, every fifth normal image is held out
NAMES_ARE_TIMES = (
    "names stand for time: detectors are fitted on the first half of the normal photographs in the order of their file "
    "names, whatever their split, and scored on the second; if names carry no order, these numbers mean nothing"
)
FROM_TEST = "all normal images are in the test split: those used for fitting come from it and are not scored"
NO_TEST_SPLIT = (
    f"no test split: every {HELD_OUT}th normal image is held out (Real-IAD's own lists, which published numbers use: "
    "--split realiad_jsons)"
)


@dataclass(frozen=True)
class Part:
    """One product of a trial: the images to fit on, the extractor's references, and the images to score.

    ``notes`` are printed with the metrics; ``reference_notes`` only if the features use the references. ``perturbed``
    says how the images to score are changed; None leaves them as they are.
    """

    product: str
    train: tuple[Sample, ...]
    references: tuple[Sample, ...]
    test: tuple[Sample, ...]
    notes: tuple[str, ...] = ()
    reference_notes: tuple[str, ...] = ()
    perturbed: Change | None = None


@dataclass(frozen=True)
class Trial:
    """One detector is fitted on the training images of all parts (one part, except in multi-class) and scores each.

    ``setting`` names the variant of the protocol, such as "K=4"; ``draw`` is the number of the random draw. With
    ``only_references``, draws differ only in the references, which raw features do not use.
    """

    name: str
    setting: str
    draw: int
    parts: tuple[Part, ...]
    only_references: bool = False

    @property
    def images(self) -> int:
        """Number of images that are read, an estimate of the time it takes."""
        return sum(len(part.train) + len(part.test) for part in self.parts)


def trials(samples: Sequence[Sample], options: ProtocolOptions) -> list[Trial]:
    """Return every trial of a protocol. Raises ValueError that names products with too few images for it."""
    products = by_product(samples)
    if not products:
        raise ValueError("no samples: nothing can be evaluated")
    if options.protocol == "shifted-line":
        products = {name: in_time(name, group) for name, group in products.items()}
    shots_or_all: Sequence[int | None] = (options.shots if options.protocol in FEW else ()) or (None,)
    _check_pools(products, max(shots or 0 for shots in shots_or_all))
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
    only_references = options.protocol in ("full", "reference-sensitivity")
    found = [
        Trial(
            name,
            _setting(options, shots, any(sample.noise for sample in group)),
            draw,
            (_part(name, group, options, options.seed + draw, shots),),
            only_references,
        )
        for name, group in products.items()
        for shots in shots_or_all
        for draw in range(1 if shots == 0 else options.repeats)
    ]
    if options.protocol == "robustness":  # unperturbed trials come last, since the maps of the last setting are shown
        return [each for trial in found for each in (*_perturbed(trial, options.seed), trial)]
    return found


def _perturbed(trial: Trial, seed: int) -> Iterator[Trial]:
    """Yield a trial that differs in the images to score alone for each setting of `perturbations`."""
    for setting, kinds in SETTINGS.items():
        change = Change(seed + trial.draw, kinds)
        parts = [replace(part, perturbed=change, notes=(*part.notes, change.said)) for part in trial.parts]
        yield replace(trial, setting=trial.setting.replace(PLAIN, setting), parts=tuple(parts))


def in_time(product: str, group: Sequence[Sample]) -> list[Sample]:
    """Return the samples of a product with other splits: train for the first half of its normal images, in the order of
    their file names (numbers in them count as numbers), test for the second half and for the anomalies that are scored.

    Raises ValueError if there are fewer than two normal images.
    """
    scored = [group[index] for index in queries(group, ()) if group[index].anomalous or group[index].of_defective_part]
    good = {sample.image: sample for sample in group if not (sample.anomalous or sample.of_defective_part)}
    if len(good) < 2:
        raise ValueError(f"{product}: {len(good)} normal images cannot be halved: a shifted line needs at least 2")
    ordered = [good[image] for image in sorted(good, key=_by_name)]
    half = len(ordered) // 2
    return [
        *(replace(sample, split="train") for sample in ordered[:half]),
        *(replace(sample, split="test", noise=False) for sample in (*ordered[half:], *scored)),
    ]


def _by_name(image: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"([0-9]+)", image.name)
    return [int(part) if part.isdecimal() else part for part in parts], str(image)


def _check_pools(products: Mapping[str, Sequence[Sample]], shots: int) -> None:
    pools = {name: len(normals(group)) for name, group in products.items()}
    if small := [f"{name} ({pool})" for name, pool in pools.items() if pool < shots]:
        raise ValueError(
            f"too few normal images for K = {shots} references: {', '.join(small)}; choose smaller numbers of images K "
            "(--shots), or leave these products out (--products)"
        )


def _setting(options: ProtocolOptions, shots: int | None, listed: bool) -> str:
    count = "" if shots is None else f"K={shots or 'all'}"
    overlap = f"{'' if options.overlap else 'no '}overlap"
    noise = f"{options.noise:g}, in the references too, {overlap}"
    if listed:
        noise = (
            f"{options.noise:g} of those listed, in the references too" if shots else "as listed, in the references too"
        )
    name = {
        "few-shot": "",
        "sample-efficiency": f"{100 * options.share:g} % of the training images",
        "robustness": PLAIN,
        "contamination": f"noise {noise}",
    }.get(options.protocol, options.protocol)
    return ", ".join(filter(None, (count, name)))


def split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Split into normal training images and images to score; without a test split every fifth normal image is held out.

    Raises ValueError if there is no normal image to fit on.
    """
    pool = normals(samples)
    if not any(sample.split == "test" for sample in samples):
        pool = [index for position, index in enumerate(pool) if position % HELD_OUT != HELD_OUT - 1]
    elif all(samples[index].split == "test" for index in pool):
        raise ValueError("all normal images are in the test split: there is nothing to fit on")
    if not pool:
        raise ValueError("there are no normal images to fit on")
    return [samples[index] for index in pool], [samples[index] for index in queries(samples, pool)]


def _part(product: str, group: Sequence[Sample], options: ProtocolOptions, seed: int, shots: int | None = None) -> Part:
    try:
        if shots:
            return _few(product, group, options, seed, shots)
        train, test = split(group)
    except ValueError as error:
        raise ValueError(f"{product}: {error}") from error
    notes: tuple[str, ...] = () if any(sample.split == "test" for sample in group) else (NO_TEST_SPLIT,)
    notes += _about(group, options)
    if options.protocol == "sample-efficiency":
        train = _some(train, max(1, round(options.share * len(train))), seed)
    elif options.protocol == "contamination" and (listed := [sample for sample in group if sample.noise]):
        train = _shuffled([*train, *listed], seed)
    elif options.protocol == "contamination":
        moved, test, fewer = _contaminating(test, test, round(options.noise * len(train)), options, seed)
        train, notes = _shuffled([*train, *moved], seed), notes + fewer
    if shots == 0:
        return Part(product, tuple(train), tuple(train), tuple(test), notes)
    references = _some(train, min(options.references, len(train)), seed)
    told: tuple[str, ...] = ()
    if len(references) < options.references:
        told = (f"{len(references)} references instead of {options.references}: there are no more training images",)
    if wrong := sum(sample.anomalous for sample in references):
        told += (f"{wrong} references are anomalies, drawn with the contaminated training images",)
    return Part(product, tuple(train), tuple(references), tuple(test), notes, told)


def _few(product: str, group: Sequence[Sample], options: ProtocolOptions, seed: int, shots: int) -> Part:
    """Return a part with K images to fit on, which are the references too; all images except these can be scored."""
    pool = normals(group)
    chosen = [pool[index] for index in random_references(len(pool), shots, seed)]
    train = [group[index] for index in chosen]
    test = [group[index] for index in queries(group, chosen)]
    notes = (FROM_TEST,) if any(sample.split == "test" for sample in train) else _about(group, options, shots)
    if options.protocol == "contamination":
        wanted = max(1, round(options.noise * shots))
        if wanted >= shots:
            raise ValueError(
                f"of K = {shots} images a share of {options.noise:g}, and at least one, are anomalies: no normal one "
                "is left; choose more images (--shots) or a smaller share (--noise)"
            )
        listed = [sample for sample in group if sample.noise]
        moved, test, fewer = _contaminating(listed or test, test, wanted, options, seed)
        train = _shuffled([*_some(train, shots - len(moved), seed), *moved], seed)
        notes += (*fewer, f"{len(moved)} of the K = {shots} images, which are the references too, are anomalies")
    return Part(product, tuple(train), tuple(train), tuple(test), notes)


def _some(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    return [samples[index] for index in random_references(len(samples), count, seed)]


def _contaminating(
    source: Sequence[Sample], test: list[Sample], wanted: int, options: ProtocolOptions, seed: int
) -> tuple[list[Sample], list[Sample], tuple[str, ...]]:
    """Draw anomalies of ``source`` for training; without overlap they are no longer among the ``test`` images."""
    anomalies = [sample for sample in source if sample.anomalous]
    count = min(wanted, len(anomalies) // 2)
    moved = _some(anomalies, count, seed) if count else []
    notes = () if count == wanted else (f"{count} anomalies instead of {wanted}: half of the product's",)
    if not options.overlap:
        gone = {sample.image for sample in moved}
        test = [sample for sample in test if sample.image not in gone]
    return moved, test, notes


def _shuffled(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Shuffle training images, so that no detector gets all anomalies at the end."""
    return [samples[index] for index in np.random.default_rng(seed).permutation(len(samples))]


def _about(group: Sequence[Sample], options: ProtocolOptions, shots: int | None = None) -> tuple[str, ...]:
    """Return notes that say how a line is halved, and how many training images of the set's own list are of defective
    parts, if any are."""
    own = (NAMES_ARE_TIMES,) if options.protocol == "shifted-line" else ()
    listed = [sample for sample in group if sample.noise]
    if not listed:
        return own
    marked, whole = sum(sample.anomalous for sample in listed), len(listed) + len(normals(group))
    used = f"{'some are ' if shots else ''}fitted on as if they were normal"
    used = used if options.protocol == "contamination" else "left out"
    more = "" if options.protocol == "contamination" else " (--protocol contamination fits on them)"
    told = f"{len(listed)} of the {whole} listed training images are of defective parts, {marked} with a marked defect"
    return (*own, f"{told}: {used}{more}")
