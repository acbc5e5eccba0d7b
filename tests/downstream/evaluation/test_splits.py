"""Which images become references and which are scored, for every mixture of splits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from adpretrain.backbones import load_backbone
from adpretrain.data import Sample
from adpretrain.extractor import ADExtractor
from downstream.detector import Prediction
from downstream.evaluation.few_shot import FeatureSet, measure, same_residuals


def images(*kinds: str) -> FeatureSet:
    """Samples such as "train good" or "test dent", in order."""
    samples = []
    for index, kind in enumerate(kinds):
        split, defect = kind.split()
        image = Path(f"{index}.png")
        samples.append(Sample(image, None if defect == "good" else image, "cap", defect, None, split))
    return FeatureSet(samples, [], torch.zeros(len(samples), 1, 1, dtype=torch.bool))


@pytest.mark.parametrize(
    ("kinds", "references", "queries"),
    [
        (("train good", "validation good", "test good", "test dent"), [0], [2, 3]),
        (("validation good", "test good", "test dent"), [0], [1, 2]),
        (("test good", "test good", "test dent"), [0, 1], [2]),  # what was learnt from is not scored
        (("train good", "train dent", "train good", "validation good"), [0, 2], [1]),
        (("train dent", "train good", "train dent"), [1], [0, 2]),
    ],
)
def test_validation_images_are_neither_scored_nor_references_beside_train(
    kinds: tuple[str, ...], references: list[int], queries: list[int]
) -> None:
    group = images(*kinds)
    assert group.normals() == references
    assert group.queries(references) == queries


@pytest.mark.parametrize("kinds", [("validation good", "validation dent"), ("train good", "validation good")])
def test_nothing_to_score_is_an_error(kinds: tuple[str, ...]) -> None:
    group = images(*kinds)
    with pytest.raises(ValueError, match="nothing to score: no test images"):
        group.queries(group.normals())


def test_a_defect_without_a_mask_leaves_image_metrics_alone() -> None:
    """Its pixels would be scored as normal; whether it is found needs no mask."""
    maps = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    prediction = Prediction(torch.tensor([0.1, 0.9, 0.8]), maps)
    group = images("test good", "test dent", "test dent")
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[1, 2:4, 2:4] = True
    good, marked, bare = (*group.samples[:2], replace(group.samples[2], mask=None))
    found = measure(prediction, FeatureSet([good, marked, bare], [], masks), [0, 1, 2])
    assert found.image_auroc == 1.0
    assert all(np.isnan([found.pixel_auroc, found.pixel_ap, found.pixel_f1, found.aupro]))
    assert len(found.notes) == 1
    assert "1 defects have no mask" in found.notes[0]
    whole = measure(Prediction(prediction.scores[:2], maps[:2]), FeatureSet([good, marked], [], masks), [0, 1])
    assert not np.isnan(whole.pixel_auroc)


@pytest.mark.parametrize("changed", [{"norm": "released"}, {"matching": "cosine"}])
def test_extractors_of_another_norm_or_matching_are_not_averaged(changed: dict[str, str]) -> None:
    backbone = load_backbone("lite0", image_size=64)
    assert same_residuals(ADExtractor(backbone), ADExtractor(backbone))
    assert not same_residuals(ADExtractor(backbone), ADExtractor(backbone, **changed))
