"""The samples of a product: which are learnt from, which are scored, and warnings about their masks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from adpretrain.data.checking import inverted
from adpretrain.data.samples import Sample
from adpretrain.photographs import find_full_scale
from adpretrain.references import random_references

LOOKED_AT = 64  # photographs of a product that its full scale is found from


def product_of(sample: Sample) -> str:
    """The name of a sample's product, which shares references: its category and, if there are several, its view."""
    return f"{sample.category}/{sample.view}" if sample.view else sample.category


def by_product(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Samples grouped by category and camera view, the unit that shares references."""
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[product_of(sample)].append(sample)
    return dict(sorted(groups.items()))


def normals(samples: Sequence[Sample]) -> list[int]:
    """Indices that may be learnt from: the normal images of the train split if there are any, else of the validation
    split, else all normal images. Unmarked views of defective parts are excluded, and so are test images that a listing
    (or the hash of their bytes) also puts into another split."""
    tested = {sample.image for sample in samples if sample.split == "test"}
    good = [
        index
        for index, sample in enumerate(samples)
        if not (sample.anomalous or sample.of_defective_part) and (sample.split == "test" or sample.image not in tested)
    ]
    by_split = [[index for index in good if samples[index].split == name] for name in ("train", "validation")]
    return by_split[0] or by_split[1] or good


def with_full_scales(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with the full scale of their product, found from up to `LOOKED_AT` of its `normals`, evenly spaced.

    Raises ValueError that names a product whose photographs have no full scale (`full_scale_of`).
    """
    scales = {}
    for name, group in by_product(samples).items():
        good = normals(group)
        looked_at = good[:: max(1, -(-len(good) // LOOKED_AT))]
        try:
            scales[name] = find_full_scale((group[index].image, None) for index in looked_at)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return [replace(sample, full_scale=scales[product_of(sample)]) for sample in samples]


def queries(samples: Sequence[Sample], references: Sequence[int]) -> list[int]:
    """Indices to score, without the references: the test split if there is one, else all but the validation split.

    Raises ValueError if nothing is left.
    """
    chosen = set(references)
    held = [i for i, sample in enumerate(samples) if i not in chosen and sample.split == "test"]
    rest = [i for i, sample in enumerate(samples) if i not in chosen and sample.split != "validation"]
    if not (held or rest):
        raise ValueError(f"nothing to score: no test images, and every other one is a reference ({len(chosen)})")
    return held or rest


def draw_shots(samples: Sequence[Sample], shots: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices of K random references of one product, and indices of the images to score against them.

    Raises ValueError naming the product if it has fewer than K normal images, or if nothing is left to score.
    """
    pool, product = normals(samples), product_of(samples[0])
    if shots > len(pool):
        raise ValueError(
            f"{product}: {shots} references (shots) cannot be drawn from its pool of {len(pool)} normal images; choose "
            "fewer shots, or leave this product out"
        )
    references = [pool[index] for index in random_references(len(pool), shots, seed)]
    try:
        return references, queries(samples, references)
    except ValueError as error:
        raise ValueError(f"{product}: {error}") from error


def about_bare(samples: Sequence[Sample]) -> str:
    """Why the samples have no pixel metrics: defects without a mask would count as normal pixels. "" if they have."""
    bare = [sample.image.name for sample in samples if sample.anomalous and not sample.mask_files]
    if not bare:
        return ""
    return f"{len(bare)} defects have no mask, such as {bare[0]}: no pixel metrics, which need one for each"


def about_inverted(samples: Sequence[Sample], shares: Sequence[float]) -> str:
    """The warning of `adpretrain check-data` about masks that mark more than half of their image, given the ``shares``
    of marked pixels; "" if there is none."""
    told = [line for s, share in zip(samples, shares, strict=True) if (line := inverted(s.mask_files, share))]
    more = f" ({len(told)} of such masks; `adpretrain check-data` lists all)" if len(told) > 1 else ""
    return told[0] + more if told else ""
