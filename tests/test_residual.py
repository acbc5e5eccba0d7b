"""Nearest references and residuals against brute force in float64, within a memory budget."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adpretrain.leave_one_out import leave_one_out_residuals
from adpretrain.residual import (
    as_map,
    nearest_reference,
    residual_features,
    residual_tokens,
    search_index,
    similarities,
    tokens,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_distances(query_BTC: Tensor, bank_RNC: Tensor, metric: str) -> Tensor:
    """[B, T, N] in float64; banks are repeated for every image."""
    query, bank = query_BTC.double(), bank_RNC.double().expand(query_BTC.shape[0], -1, -1)
    if metric == "l2":
        return torch.cdist(query, bank, compute_mode="donot_use_mm_for_euclid_dist")
    query, bank = (x / x.norm(dim=-1, keepdim=True) for x in (query, bank))
    return 1 - query @ bank.transpose(1, 2)


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("banks", [1, 3])
@pytest.mark.parametrize("size", [1, 63, 64, 500])
def test_the_neighbour_is_brute_forces(metric: str, banks: int, size: int) -> None:
    query, bank = normal(3, 50, 16), normal(banks, size, 16, seed=1)
    distance = brute_distances(query, bank, metric)
    index = nearest_reference(query, bank, metric)
    assert index.shape == (3, 50)
    assert torch.equal(index, distance.argmin(2))


def test_the_two_metrics_differ_where_they_should() -> None:
    bank = torch.tensor([[[10.0, 0.0], [0.6, 0.6]]])
    query = torch.tensor([[[1.0, 0.1]]])
    assert nearest_reference(query, bank, "l2").item() == 1
    assert nearest_reference(query, bank, "cosine").item() == 0
    # The un-normalised match is subtracted, as in the released code.
    torch.testing.assert_close(residual_tokens(query, bank, "cosine"), torch.tensor([[[-9.0, 0.1]]]))


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("banks", [1, 3])
def test_any_chunk_size_gives_the_same_neighbours(metric: str, banks: int) -> None:
    query, bank = normal(3, 70, 12), normal(banks, 300, 12, seed=1)
    whole = nearest_reference(query, bank, metric)
    for chunk_bytes in (1, 3000, 100_000):
        assert torch.equal(nearest_reference(query, bank, metric, chunk_bytes), whole)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_prepared_bank_and_no_chunks_give_the_same_neighbours(metric: str, dtype: torch.dtype) -> None:
    query, bank = normal(3, 70, 12).to(dtype), normal(1, 300, 12, seed=1).to(dtype)
    whole = nearest_reference(query, bank, metric)
    index = search_index(bank[0], metric)
    assert index.rows.dtype == torch.promote_types(dtype, torch.float32)
    for chunk_bytes in (3000, None):
        assert torch.equal(nearest_reference(query, bank, metric, chunk_bytes, index), whole)
        assert torch.equal(nearest_reference(query, bank, metric, chunk_bytes), whole)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("banks", [1, 2])
def test_no_tensor_exceeds_the_budget(metric: str, banks: int) -> None:
    query, bank = normal(2, 2000, 4), normal(banks, 1500, 4, seed=1)
    budget = 256 << 10  # 65,536 floats; all pairs would be 3 to 6 million
    with LargestTensor() as unlimited:
        whole = nearest_reference(query, bank, metric, 1 << 30)
    with LargestTensor() as largest:
        index = nearest_reference(query, bank, metric, budget)
    assert unlimited.elements >= 2000 * 1500
    assert largest.elements <= budget // 4
    assert torch.equal(index, whole)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_ties_go_to_the_lowest_index(metric: str) -> None:
    rows = normal(40, 29)
    bank = rows.repeat(7, 1)[None]  # every row seven times, 40 apart, across block borders
    index = nearest_reference(rows[None] + 1e-3, bank, metric)
    assert torch.equal(index[0], torch.arange(40))


def test_a_large_common_offset_does_not_cost_the_digits() -> None:
    """x.r - r^2 / 2 of raw float32 features near 1000 loses differences of 0.01; the shift by the mean keeps them."""
    offset = 1000.0 + normal(1, 1, 32, seed=2)
    query, bank = offset + 0.01 * normal(1, 200, 32), offset + 0.01 * normal(1, 400, 32, seed=1)
    distance = brute_distances(query, bank, "l2")
    chosen = distance.gather(2, nearest_reference(query, bank)[..., None])[..., 0]
    assert (chosen <= distance.amin(2) * (1 + 1e-3)).all()
    unshifted = (query @ bank[0].T - bank[0].square().sum(1) / 2).argmax(2)
    assert (distance.gather(2, unshifted[..., None])[..., 0] > distance.amin(2) * 1.1).any()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_autocast_and_bfloat16_keep_the_float32_neighbours(metric: str) -> None:
    query, bank = 3 + 0.05 * normal(2, 100, 64), 3 + 0.05 * normal(1, 300, 64, seed=1)
    expected = nearest_reference(query, bank, metric)
    half = (query.bfloat16() - query.bfloat16().mean()) @ (bank.bfloat16()[0] - bank.bfloat16().mean()).T
    assert not torch.equal(half.argmax(2), expected)  # bfloat16 arithmetic does pick others
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_reference(query, bank, metric), expected)
    rounded = query.bfloat16(), bank.bfloat16()
    distance = brute_distances(*rounded, metric)
    chosen = distance.gather(2, nearest_reference(*rounded, metric)[..., None])[..., 0]
    torch.testing.assert_close(chosen, distance.amin(2), rtol=1e-5, atol=1e-6)
    assert residual_tokens(*rounded, metric).dtype == torch.bfloat16


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("banks", [1, 2])
def test_residual_features_against_a_loop(metric: str, banks: int) -> None:
    features = [normal(2, 5, 4, 3), normal(2, 7, 2, 6, seed=3)]
    references = [normal(banks, 20, 5, seed=1), normal(banks, 30, 7, seed=2)]
    out = residual_features(features, references, metric)
    for feature, bank, residual in zip(features, references, out, strict=True):
        assert residual.shape == feature.shape
        for b in range(2):
            for y in range(feature.shape[2]):
                for x in range(feature.shape[3]):
                    vector, own = feature[b, :, y, x], bank[b if banks > 1 else 0]
                    nearest = own[brute_distances(vector[None, None], own[None], metric).argmin()]
                    assert torch.equal(residual[b, :, y, x], vector - nearest)


def test_an_image_against_itself_leaves_nothing() -> None:
    feature = normal(1, 6, 5, 5)
    assert not residual_features([feature], [tokens(feature)])[0].any()


def test_gradients_reach_the_features() -> None:
    feature = normal(1, 6, 5, 5).requires_grad_()
    residual_features([feature], [normal(1, 9, 6, seed=1)])[0].sum().backward()
    assert torch.equal(feature.grad, torch.ones_like(feature))


def test_tokens_and_maps_are_inverse() -> None:
    feature = normal(2, 3, 4, 5)
    assert torch.equal(tokens(feature)[1, 2 * 5 + 3], feature[1, :, 2, 3])
    assert torch.equal(as_map(tokens(feature), feature), feature)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("images", [1, 2, 5])
def test_leave_one_out_against_a_loop(metric: str, images: int) -> None:
    each = 30
    bank = normal(images * each, 8)
    expected = []
    for image in range(images):
        for token in range(each):
            own = image * each + token
            if images == 1:
                allowed = [row for row in range(each) if row != own]
            else:
                allowed = [row for row in range(images * each) if row // each != image]
            distance = brute_distances(bank[None, own : own + 1], bank[None, allowed], metric)
            expected.append(bank[own] - bank[allowed[int(distance.argmin())]])
    assert torch.equal(leave_one_out_residuals(bank[None], images, metric)[0], torch.stack(expected))


def test_errors_name_what_does_not_fit() -> None:
    query, bank = normal(3, 4, 5), normal(1, 6, 5)
    with pytest.raises(ValueError, match=r"'euclid' is unknown.*'l2', 'cosine'"):
        nearest_reference(query, bank, "euclid")
    with pytest.raises(ValueError, match=r"5 channels but references have 4"):
        nearest_reference(query, bank[..., :4])
    for wrong in (normal(2, 6, 5), normal(6, 5), normal(1, 0, 5)):
        with pytest.raises(ValueError, match=r"do not fit a batch of 3 images: expected \[1, N, C\]"):
            nearest_reference(query, wrong)
    with pytest.raises(ValueError, match="1 levels but references have 2"):
        residual_features([normal(3, 5, 2, 2)], [bank, bank])
    for images in (0, 4):
        with pytest.raises(ValueError, match=rf"6 reference tokens cannot come from {images} images"):
            leave_one_out_residuals(bank, images)


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_matching_is_in_full_precision_whatever_the_process_allows(setting: str) -> None:
    """Where the processor, or a GPU, multiplies in TF32 or bfloat16 on request, neighbours would change."""
    query, bank = torch.randn(2, 64, 96), torch.randn(1, 300, 96)
    expected = similarities(query.flatten(0, 1), search_index(bank[0]))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        found = similarities(query.flatten(0, 1), search_index(bank[0]))
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found, expected)


def test_a_bank_for_each_image_is_searched_in_one_product_and_chunks_change_nothing() -> None:
    """Against image by image, over chunks of any size, and (L2) against all distances."""
    query, banks = torch.randn(5, 30, 8, dtype=torch.float64), torch.randn(5, 70, 8, dtype=torch.float64)
    expected = torch.stack([torch.cdist(q, b).argmin(1) for q, b in zip(query, banks, strict=True)])
    for metric in ("l2", "cosine"):
        alone = torch.stack([nearest_reference(q[None], b[None], metric)[0] for q, b in zip(query, banks, strict=True)])
        for chunk_bytes in (1, 10_000, None):
            assert torch.equal(nearest_reference(query, banks, metric, chunk_bytes), alone)
        if metric == "l2":
            assert torch.equal(alone, expected)
