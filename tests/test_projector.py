"""Projectors: the key/value cache, the attention against two other computations, the ablation architectures."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adpretrain.config import ProjectorConfig
from adpretrain.projector import (
    ARCHITECTURES,
    Attention,
    FeatureProjector,
    FixedKeyValueProjector,
    LearnableKeyValueProjector,
)

WIDTH, REFERENCES, HEADS = 16, 24, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(module: nn.Module) -> nn.Module:
    """Random weights everywhere: an untrained projector returns its input, which would hide what is tested."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return module


def one_level(layers: int = 1, squeeze_excite: bool = False) -> LearnableKeyValueProjector:
    torch.manual_seed(0)
    return randomised(LearnableKeyValueProjector(WIDTH, REFERENCES, HEADS, 2.0, layers, squeeze_excite)).eval()


def naive_attention(attention: Attention, x_BTC: Tensor, context_BMC: Tensor) -> Tensor:
    """Head by head and query by query, in float64."""
    query = F.linear(x_BTC.double(), attention.query.weight.double(), attention.query.bias.double())
    both = F.linear(context_BMC.double(), attention.key_value.weight.double(), attention.key_value.bias.double())
    inner = query.shape[-1]
    key, value = both[..., :inner], both[..., inner:]
    size = inner // attention.heads
    out = torch.zeros_like(query)
    for b in range(query.shape[0]):
        for t in range(query.shape[1]):
            for head in range(attention.heads):
                part = slice(head * size, (head + 1) * size)
                scores = torch.stack([k @ query[b, t, part] for k in key[b][:, part]]) / size**0.5
                weights = scores.exp() / scores.exp().sum()
                out[b, t, part] = sum(w * v for w, v in zip(weights, value[b][:, part], strict=True))
    return F.linear(out, attention.out.weight.double(), attention.out.bias.double())


def naive_projector(level: LearnableKeyValueProjector, x_BTC: Tensor) -> Tensor:
    """ADPretrain Sec. 3.3: subtraction after the attention, addition after the MLP, no layer norm."""
    hidden = F.linear(level.references, level.reference_projection.weight, level.reference_projection.bias)
    for attention, mlp in zip(level.attention, level.mlp, strict=True):
        x_BTC = x_BTC - naive_attention(attention, x_BTC, hidden.expand(x_BTC.shape[0], -1, -1)).float()
        inner = mlp.fc1(x_BTC)
        if mlp.squeeze is not None:
            gate = torch.sigmoid(mlp.excite(torch.relu(mlp.squeeze(inner.mean(1)))))
            inner = inner * gate[:, None]
        x_BTC = x_BTC + mlp.fc2(0.5 * inner * (1 + torch.erf(inner / 2**0.5)))
    return x_BTC


def fresh(level: LearnableKeyValueProjector, x_BTC: Tensor) -> Tensor:
    """The output of a copy that has never cached anything."""
    copied = LearnableKeyValueProjector(WIDTH, REFERENCES, HEADS, 2.0, len(level.mlp), level.mlp[0].squeeze is not None)
    copied.to(level.references.dtype).load_state_dict(level.state_dict())
    return copied.eval()(x_BTC)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("squeeze_excite", [False, True])
def test_the_projector_against_loops(layers: int, squeeze_excite: bool) -> None:
    level, x = one_level(layers, squeeze_excite), normal(2, 5, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(level(x), naive_projector(level, x), rtol=1e-5, atol=1e-5)


def test_the_attention_is_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs = Attention(WIDTH, HEADS), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    x, context = normal(2, 6, WIDTH).requires_grad_(), normal(2, 9, WIDTH, seed=1).requires_grad_()
    mine, expected = ours(x, ours.project_context(context)), theirs(x, context, context)[0]
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(mine.square().sum(), [x, context]),
        torch.autograd.grad(expected.square().sum(), [x, context]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_width_that_the_heads_do_not_divide() -> None:
    torch.manual_seed(0)
    attention, x = Attention(29, 4), normal(2, 3, 29)
    with torch.no_grad():
        expected = naive_attention(attention, x, x).float()
        torch.testing.assert_close(attention(x, attention.project_context(x)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
def test_cached_equals_fresh_bit_for_bit(layers: int) -> None:
    level, x = one_level(layers), normal(2, 7, WIDTH)
    trained = level.train()(x).detach()
    level.eval()
    with torch.no_grad():
        first, cached = level(x), level(x)
        assert torch.equal(cached, first)
        assert torch.equal(cached, fresh(level, x))
        assert level.keys_values()[0][0] is level.keys_values()[0][0]  # it is a cache
    torch.testing.assert_close(cached, trained, rtol=1e-6, atol=1e-6)
    with torch.inference_mode():
        assert torch.equal(level(x), cached)
    with torch.no_grad():  # the inference tensors of the call above must not leak into this one
        assert not level(x).is_inference()


def _optimiser_step(level: LearnableKeyValueProjector) -> None:
    optimiser = torch.optim.Adam(level.parameters(), lr=0.1)
    with torch.enable_grad():
        level(normal(2, 7, WIDTH)).square().sum().backward()
    optimiser.step()


def _train_a_step(level: LearnableKeyValueProjector) -> None:
    level.train()
    _optimiser_step(level)
    level.eval()


def _load(level: LearnableKeyValueProjector, assign: bool = False) -> None:
    torch.manual_seed(9)
    other = randomised(LearnableKeyValueProjector(WIDTH, REFERENCES, HEADS, 2.0, 1, False))
    level.load_state_dict(other.state_dict(), assign=assign)


def _assign(level: LearnableKeyValueProjector) -> None:
    level.references.data = normal(REFERENCES, WIDTH, seed=5)


def _assign_twice(level: LearnableKeyValueProjector) -> None:
    for seed in (5, 6):  # the second tensor may get the memory of the one that the cache was made from
        level.references.data = normal(REFERENCES, WIDTH, seed=seed)


def _in_place(level: LearnableKeyValueProjector) -> None:
    level.attention[0].key_value.weight.mul_(2)


def _new_parameter(level: LearnableKeyValueProjector) -> None:
    level.reference_projection.bias = nn.Parameter(normal(WIDTH, seed=7))


CHANGES = [_optimiser_step, _train_a_step, _load, _assign, _assign_twice, _in_place, _new_parameter]


@pytest.mark.parametrize("change", [*CHANGES, lambda level: _load(level, assign=True)])
@torch.no_grad()
def test_new_weights_never_meet_old_keys(change: Callable[[LearnableKeyValueProjector], None]) -> None:
    level, x = one_level(), normal(2, 7, WIDTH)
    before = level(x)
    change(level)
    after = level(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(level, x))


@torch.no_grad()
def test_the_cache_follows_dtype_and_autocast() -> None:
    level, x = one_level(), normal(2, 7, WIDTH)
    single = level(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = level(x)
    assert not torch.equal(half, single)
    assert torch.equal(level(x), single)
    torch.testing.assert_close(half.float(), single, rtol=0.05, atol=0.05)
    level.double()
    double = level(x.double())
    assert double.dtype == torch.float64
    assert torch.equal(double, fresh(level, x.double()))
    torch.testing.assert_close(double.float(), single, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_cache_is_neither_saved_nor_copied() -> None:
    level, x = one_level(), normal(2, 7, WIDTH)
    keys = set(level.state_dict())
    out = level(x)
    assert set(level.state_dict()) == keys
    copied = copy.deepcopy(level)
    copied.references.mul_(2)
    assert torch.equal(level(x), out)
    assert not torch.equal(copied(x), out)


@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_constant_keys_and_values_change_nothing_and_stay(layers: int) -> None:
    level, x = one_level(layers), normal(2, 7, WIDTH)
    fixed, expected = FixedKeyValueProjector(level), level(x)
    assert torch.equal(fixed(x), expected)
    level.references.normal_()
    assert torch.equal(fixed(x), expected)
    assert not torch.equal(level(x), expected)


def test_gradients_flow_through_keys_and_values_even_after_caching() -> None:
    level, x = one_level(), normal(2, 7, WIDTH)
    with torch.no_grad():
        level(x)
    level(x).square().sum().backward()
    for name, parameter in level.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A key bias shifts all scores of a query alike, so only the value half of that bias can matter.
        assert parameter.grad.any(), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("banks", [1, 2])
def test_every_architecture_keeps_shapes_and_trains_every_weight(architecture: str, banks: int) -> None:
    torch.manual_seed(0)
    channels = [12, 29]
    projector = randomised(
        FeatureProjector(channels, ProjectorConfig(architecture, 8, heads=4, mlp_ratio=2.0, layers=2))
    )
    residuals = [normal(2, 12, 4, 3), normal(2, 29, 2, 5)]
    context = [normal(banks, 6, width, seed=3) for width in channels]
    assert projector.needs_reference_residuals == ("cross" in architecture)
    out = projector(residuals, context if projector.needs_reference_residuals else None)
    assert [x.shape for x in out] == [x.shape for x in residuals]
    sum(x.square().sum() for x in out).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in projector.parameters())


def test_an_untrained_projector_returns_its_input_and_learns() -> None:
    torch.manual_seed(0)
    projector, residual = FeatureProjector([12], ProjectorConfig(references=8, heads=4, layers=2)), normal(2, 12, 4, 3)
    assert torch.equal(projector([residual])[0], residual)
    optimiser = torch.optim.Adam(projector.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (projector([residual])[0] - 2 * residual).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("architecture", ["linear", "mlp"])
def test_pointwise_architectures_see_one_token_at_a_time(architecture: str) -> None:
    projector = FeatureProjector([6], ProjectorConfig(architecture, mlp_ratio=2.0)).eval()
    residual = normal(1, 6, 3, 3)
    changed = residual.clone()
    changed[0, :, 1, 2] += 1
    difference = (projector([changed])[0] - projector([residual])[0]).abs().sum(1)[0]
    assert difference[1, 2] > 0
    difference[1, 2] = 0
    assert not difference.any()


def test_the_linear_ablation_is_a_matrix() -> None:
    projector = FeatureProjector([6], ProjectorConfig("linear"))
    layer, residual = projector.levels[0][0], normal(2, 6, 3, 4)
    expected = torch.einsum("oc,bchw->bohw", layer.weight, residual) + layer.bias[:, None, None]
    torch.testing.assert_close(projector([residual])[0], expected, rtol=1e-5, atol=1e-6)


def test_self_attention_adds_and_cross_attention_subtracts() -> None:
    x, context = normal(1, 6, 2, 2), normal(1, 5, 6, seed=1)
    for architecture, sign in (("self_attention", 1), ("cross_attention", -1)):
        projector = FeatureProjector([6], ProjectorConfig(architecture, heads=2)).eval()
        level, flat = projector.levels[0], x.flatten(2).transpose(1, 2)
        source = flat if sign > 0 else context
        with torch.no_grad():
            attended = flat + sign * naive_attention(level.attention[0], flat, source).float()
            expected = level.mlp[0](attended).transpose(1, 2).view_as(x)
            torch.testing.assert_close(projector([x], [context])[0], expected, rtol=1e-5, atol=1e-5)


def test_errors_name_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'transformer' is unknown.*learnable_kv"):
        FeatureProjector([4], ProjectorConfig("transformer"))
    with pytest.raises(ValueError, match=r"'official' is unknown.*'released'"):
        FeatureProjector([4], ProjectorConfig(form="official"))
    projector = FeatureProjector([4, 4], ProjectorConfig("cross_attention", heads=2))
    with pytest.raises(ValueError, match="'cross_attention' needs reference_residuals"):
        projector([normal(1, 4, 2, 2)] * 2)
    with pytest.raises(ValueError, match="got 1 levels of residuals; this projector has 2"):
        projector([normal(1, 4, 2, 2)])
    with pytest.raises(ValueError, match=r"residuals \(0, 4, 2, 2\) hold no images"):
        FeatureProjector([4], ProjectorConfig("linear"))([normal(0, 4, 2, 2)])
