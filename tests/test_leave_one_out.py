"""One pass over all pairs gives what leaving out each photograph in turn gives."""

import pytest
import torch
from torch import Tensor

from adpretrain.backbones import load_backbone
from adpretrain.config import ProjectorConfig
from adpretrain.extractor import ADExtractor
from adpretrain.leave_one_out import LeaveOneOut, nearest_of_pair
from adpretrain.local_scale import LocalScale
from adpretrain.projector import FeatureProjector

ROUNDING = 5e-4  # of residuals of some 10, where an image's features depend on how many are with it


def extractor(metric: str, scaled: bool, architecture: str | None) -> ADExtractor:
    torch.manual_seed(0)
    backbone = load_backbone("lite0", image_size=64)
    config = ProjectorConfig(architecture, references=8, heads=2, mlp_ratio=1.0) if architecture else None  # type: ignore[arg-type]
    projector = FeatureProjector(backbone.channels, config) if config else None
    if projector is not None:
        with torch.no_grad():
            for parameter in projector.parameters():
                parameter.normal_(std=0.2)
    scale = LocalScale(len(backbone.channels)) if scaled else None
    return ADExtractor(backbone, projector, scale, matching=metric)


def by_hand(model: ADExtractor, images: Tensor) -> list[Tensor]:
    parts = []
    for image in range(len(images)):
        others = torch.cat([images[:image], images[image + 1 :]])
        parts.append(model(images[image : image + 1], model.encode_references(others)))
    return [torch.cat(level) for level in zip(*parts, strict=True)]


@pytest.mark.parametrize("shots", [2, 3, 5])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("scaled", [True, False])
def test_equals_leaving_out_each_in_turn(shots: int, metric: str, scaled: bool) -> None:
    model = extractor(metric, scaled, "learnable_kv")
    images = torch.rand(shots, 3, 64, 64, generator=torch.Generator().manual_seed(shots))
    for found, expected in zip(model.leave_one_out(images), by_hand(model, images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=ROUNDING)


@pytest.mark.parametrize("architecture", [None, "cross_attention"])
def test_without_a_projector_and_with_cross_attention(architecture: str | None) -> None:
    model = extractor("l2", True, architecture)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(model.leave_one_out(images), by_hand(model, images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=ROUNDING)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def similarity(x: Tensor, y: Tensor, metric: str) -> float:
    if metric == "l2":
        return -float((x.double() - y.double()).square().sum()) / 2
    return float(torch.dot(x.double(), y.double()) / x.double().norm() / y.double().norm())


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("images", [1, 2, 4])
@pytest.mark.parametrize("region", [False, True])
def test_the_table_equals_a_naive_loop(metric: str, images: int, region: bool) -> None:
    each = 7
    bank = noise(images, each, 5)
    inside = torch.arange(images * each) % 3 > 0 if region else torch.ones(images * each, dtype=torch.bool)
    table = LeaveOneOut.of(bank.view(1, -1, 5), images, metric, inside if region else None)
    for i in range(images):
        for j in range(images):
            for t in range(each):
                if i == j and images > 1:
                    assert table.similarity_RKKT[0, i, j, t] == -torch.inf
                    continue
                allowed = [s for s in range(each) if inside[j * each + s] and (i != j or s != t)]
                every = {s: similarity(bank[i, t], bank[j, s], metric) for s in allowed}
                assert int(table.index_RKKT[0, i, j, t]) == max(every, key=every.__getitem__)
                assert float(table.similarity_RKKT[0, i, j, t]) == pytest.approx(max(every.values()), abs=1e-4)


def test_equal_distances_give_one_of_the_nearest() -> None:
    bank = torch.randint(0, 3, (3, 12, 2), generator=torch.Generator().manual_seed(0)).float()
    index = LeaveOneOut.of(bank.view(1, -1, 2), 3).index_RKKT[0]
    for i, j in ((0, 1), (1, 0), (2, 1)):
        for t in range(12):
            distances = [float((bank[i, t] - bank[j, s]).square().sum()) for s in range(12)]
            assert distances[int(index[i, j, t])] == min(distances)


@pytest.mark.parametrize("same", [False, True])
def test_a_pair_in_pieces(same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = noise(2, 50, 6), noise(2, 50, 6, seed=0 if same else 1)
    whole = nearest_of_pair(first, second, "l2", same=same)
    monkeypatch.setattr("adpretrain.leave_one_out.CHUNK_BYTES", 2 * 50 * 4 * 7)  # 7 of 50 rows
    for found, expected in zip(nearest_of_pair(first, second, "l2", same=same), whole, strict=True):
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_photographs_that_come_and_go_leave_the_bits_of_a_new_table(metric: str) -> None:
    """Sizes of the embedded extractor's levels, and one whose photographs start anywhere in memory."""
    for tokens, width in ((196, 24), (49, 7)):
        bank = noise(1, 6 * tokens, width)
        whole = LeaveOneOut.of(bank, 6, metric)
        for known in (1, 2, 4):
            earlier = LeaveOneOut.of(bank[:, : known * tokens].clone(), known, metric)
            grown = LeaveOneOut.of(bank, 6, metric, earlier=earlier)
            assert torch.equal(grown.similarity_RKKT, whole.similarity_RKKT)
            assert torch.equal(grown.index_RKKT, whole.index_RKKT)
        kept = [0, 2, 3, 5]
        fewer = LeaveOneOut.of(bank.unflatten(1, (6, -1))[:, kept].flatten(1, 2), 4, metric)
        assert torch.equal(whole.only(kept).similarity_RKKT, fewer.similarity_RKKT)
        assert torch.equal(whole.only(kept).index_RKKT, fewer.index_RKKT)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_bank_that_grew_or_shrank_is_a_new_bank(scaled: bool) -> None:
    model = extractor("l2", scaled, None)
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    start = model.encode_references(images[:4])
    start.leave_one_out()  # computes the tables
    grown = start.joined(model.encode_references(images[4:]))
    for bank, anew in (
        (grown, model.encode_references(images)),
        (grown.without([1, 4]), model.encode_references(images[[0, 2, 3, 5]])),
        (grown.without([0, 1, 2, 3]), model.encode_references(images[4:])),
    ):
        assert "tables" in vars(bank)
        for found, expected in zip(bank.leave_one_out(), anew.leave_one_out(), strict=True):
            assert torch.equal(found, expected)
        query = torch.rand(1, 3, 64, 64)
        for found, expected in zip(model(query, bank), model(query, anew), strict=True):
            assert torch.equal(found, expected)
    only_one = grown.without([0, 1, 2, 3, 4]).joined(model.encode_references(images[:1]))
    expected = model.encode_references(images[[5, 0]]).leave_one_out()
    assert all(torch.equal(a, b) for a, b in zip(only_one.leave_one_out(), expected, strict=True))


def test_a_single_photograph_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 references, got 1"):
        extractor("l2", True, None).leave_one_out(torch.rand(1, 3, 64, 64))
