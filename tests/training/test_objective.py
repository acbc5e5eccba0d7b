"""The objective over levels: sums, centres, and a NaN that names its level."""

import pytest
import torch

from adpretrain.backbones import load_backbone
from adpretrain.config import LossConfig
from adpretrain.extractor import ADExtractor
from adpretrain.losses import angle_loss, norm_loss
from adpretrain.residual import tokens
from adpretrain.training.batches import LabelledBatch, ResidualBatch
from adpretrain.training.objective import Objective, measure_centers


def batch_of(extractor: ADExtractor) -> LabelledBatch:
    torch.manual_seed(0)
    views = [[torch.randn(2, width, 4, 4) for width in extractor.channels] for _ in range(2)]
    labels = [torch.rand(2, 4, 4) < 0.3 for _ in extractor.channels]
    return LabelledBatch(views, labels, labels, [])


def test_total_is_the_sum_over_levels_of_eq_7() -> None:
    extractor = ADExtractor(load_backbone("lite0", image_size=64))
    batch = batch_of(extractor)
    losses, expected = Objective(LossConfig(lambda_=0.7), extractor)(batch.views, batch), 0.0
    for level, width in enumerate(extractor.channels):
        first, second = (tokens(view[level]).flatten(0, 1) for view in batch.views)
        marked = batch.labels[level].flatten()
        norms = norm_loss(torch.cat([first, second]), marked.repeat(2))
        expected += float(0.7 * angle_loss(first, second, marked, torch.zeros(width)) / 2 + norms)
    assert losses.values()[0] == float(losses.share) == pytest.approx(expected, rel=1e-5)


def test_a_nan_names_its_level() -> None:
    extractor = ADExtractor(load_backbone("lite0", image_size=64))
    batch = batch_of(extractor)
    batch.views[0][1][0, 0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="level 1"):
        Objective(LossConfig(), extractor)(batch.views, batch).values()


def test_centres_are_the_mean_normal_residual() -> None:
    extractor = ADExtractor(load_backbone("lite0", image_size=64))
    views = batch_of(extractor).views  # two batches of different sizes: every token counts the same
    parts = [views[0], [level[:1] for level in views[1]]]
    measure_centers(extractor, [ResidualBatch([part], torch.zeros(0), [], []) for part in parts])
    for level in range(len(extractor.channels)):
        rows = torch.cat([tokens(part[level]).flatten(0, 1) for part in parts])
        torch.testing.assert_close(getattr(extractor, f"center_{level}"), rows.mean(0))


def test_running_centres_follow_the_projected_normals() -> None:
    extractor = ADExtractor(load_backbone("lite0", image_size=64))
    batch = batch_of(extractor)
    objective = Objective(LossConfig(center="projected"), extractor)
    for _ in range(1000):
        objective(batch.views, batch)
    marked = batch.labels[0].flatten()
    both = torch.cat([tokens(view[0]).flatten(0, 1)[~marked] for view in batch.views])
    torch.testing.assert_close(extractor.center_0, both.mean(0), rtol=1e-3, atol=1e-4)
