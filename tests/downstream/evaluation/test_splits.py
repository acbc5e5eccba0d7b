"""Which images become references and which are scored, for every mixture of splits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adpretrain.backbones import load_backbone
from adpretrain.data import Sample
from adpretrain.extractor import ADExtractor
from downstream.evaluation.evaluate import FeatureSet, encode_samples, same_residuals


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


def test_a_defect_without_a_mask_is_not_scored_as_normal(tmp_path: Path) -> None:
    bare = Sample(tmp_path / "bad.png", None, "cap", "dent", None, "test")
    with pytest.raises(ValueError, match=r"1 defects have no mask, such as .*bad\.png"):
        encode_samples([bare], load_backbone("filterbank", image_size=64))


@pytest.mark.parametrize("changed", [{"norm": "released"}, {"matching": "cosine"}])
def test_extractors_of_another_norm_or_matching_are_not_averaged(changed: dict[str, str]) -> None:
    backbone = load_backbone("filterbank", image_size=64)
    assert same_residuals(ADExtractor(backbone), ADExtractor(backbone))
    assert not same_residuals(ADExtractor(backbone), ADExtractor(backbone, **changed))
