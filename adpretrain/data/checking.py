"""Decode every file of a data set and compare it with its label, in parallel."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from adpretrain.data.samples import Sample, check_size, without_masks
from adpretrain.photographs import examine_mask

NO_MASKS = "no defect has a mask: there are image metrics, but no pixel metrics, and nothing to train on"


@dataclass(frozen=True)
class Problem:
    """A problem of one image; ``doubtful``: the image can be used as it is, but a person should look at it."""

    image: Path
    reason: str
    doubtful: bool = False


def inverted(files: Sequence[Path], share: float) -> str:
    """A warning about masks that mark ``share`` of an image's pixels; "" if that can be a defect."""
    if share <= 0.5:
        return ""
    names = ", ".join(str(file) for file in files)
    return f"mask {names} marks {share:.0%} of the pixels as defective: is it inverted?"


def check_sample(sample: Sample, no_mask: str = "", mask_needed: bool = True) -> list[Problem]:
    """All problems of a sample's files: unreadable, of different sizes, or with marks that contradict the label.

    Without problems, the doubts about its masks: an unusual file, or more than half of the pixels marked.

    ``no_mask``: the message for a missing mask, if the layout knows where it should be. Without ``mask_needed`` a
    defect may have no mask.
    """
    return _check(sample, no_mask, mask_needed)[0]


def _check(sample: Sample, no_mask: str, mask_needed: bool) -> tuple[list[Problem], bytes | None]:
    """The result of `check_sample`, and a digest of the image's pixels, which is equal for lossless copies."""
    reasons, doubts = [], []
    size = digest = None
    try:
        image = sample.read()
        size = image.size
        digest = hashlib.sha256(repr(size).encode() + image.tobytes()).digest()
    except (ValueError, OSError) as error:
        reasons.append(str(error))
    marked = readable = False
    for file in sample.mask_files:
        try:
            mask, remark = examine_mask(file)
            readable = True
            doubts += [remark] if remark else []
            told = inverted([file], mask.histogram()[255] / (mask.width * mask.height))
            doubts += [told] if told else []
            marked = marked or mask.getbbox() is not None
            if size is not None:
                check_size(file, mask, sample.image, size)
        except (ValueError, OSError) as error:
            reasons.append(str(error))
    names = ", ".join(str(file) for file in sample.mask_files)
    if sample.anomalous and not sample.mask_files and mask_needed:
        reasons.append(no_mask or f"{sample.image} is a defect without a mask")
    if sample.anomalous and readable and not marked:
        reasons.append(f"{sample.image} is a defect of kind {sample.defect!r} but nothing is marked in {names}")
    if not sample.anomalous and marked:
        reasons.append(f"{sample.image} is normal but pixels are marked in {names}")
    if reasons:
        return [Problem(sample.image, reason) for reason in reasons], digest
    return [Problem(sample.image, doubt, doubtful=True) for doubt in doubts], digest


def check_samples(
    samples: Sequence[Sample],
    workers: int = 4,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    missing: Mapping[Path, str] | None = None,
    masks_needed: bool = True,
) -> list[Problem]:
    """`check_sample` for all samples, in order, in ``workers`` threads (decoding releases the GIL); then images that
    are listed in several splits, or whose copy under any name is a training image, as a test image must not be trained
    on.

    Without ``masks_needed``, a category whose defects have no masks at all gives one doubt instead of a problem for
    each defect, because its images can still be scored.

    At most ``workers`` images are in memory. ``progress`` gets (what, done, total) after every image; ``missing`` is
    that of a `MissingMasks`. Raises ValueError for fewer than one worker.
    """
    if workers < 1:
        raise ValueError(f"workers {workers}; expected at least 1")
    bare = [] if masks_needed else without_masks(samples)
    problems = [Problem(_first_defect(samples, name), f"{name}: {NO_MASKS}", doubtful=True) for name in bare]
    digests: list[bytes | None] = []
    pool = ThreadPoolExecutor(workers)
    try:
        lines = [(missing or {}).get(sample.image, "") for sample in samples]
        needed = [sample.category not in bare for sample in samples]
        for done, (found, digest) in enumerate(pool.map(_check, samples, lines, needed), start=1):
            problems += found
            digests.append(digest)
            progress("checking images", done, len(samples))
    finally:
        pool.shutdown(cancel_futures=True)  # at Ctrl+C the waiting images are not read
    splits: dict[Path, list[str]] = defaultdict(list)
    for sample in samples:
        if sample.split not in splits[sample.image]:
            splits[sample.image].append(sample.split)
    shared = {image: " and ".join(found) for image, found in splits.items() if len(found) > 1}
    problems += [Problem(image, f"{image} is in several splits: {names}") for image, names in shared.items()]
    return problems + _copies(samples, digests)


def _copies(samples: Sequence[Sample], digests: Sequence[bytes | None]) -> list[Problem]:
    """Images outside the training split whose pixels equal those of a training image with another path."""
    pairs = [(sample, digest) for sample, digest in zip(samples, digests, strict=True) if digest is not None]
    train = {digest: sample.image for sample, digest in reversed(pairs) if sample.split == "train"}
    return [
        Problem(sample.image, f"{sample.image} ({sample.split}) is a copy of the training image {train[digest]}")
        for sample, digest in pairs
        if sample.split != "train" and digest in train and train[digest] != sample.image
    ]


def _first_defect(samples: Sequence[Sample], category: str) -> Path:
    return next(sample.image for sample in samples if sample.anomalous and sample.category == category)
