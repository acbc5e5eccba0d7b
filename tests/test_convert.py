"""The authors' released projector, converted, reproduces its recorded outputs; anything else is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from released import released_state
from torch import Tensor

from adpretrain.convert import projector_from_official
from adpretrain.projector import FeatureProjector

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    return torch.load(GOLDEN / "official_projector_c64.pth", weights_only=True)["projectors"]


def test_the_golden_projector_reproduces(official: dict[str, Tensor]) -> None:
    with np.load(GOLDEN / "official_projector_c64_io.npz") as content:
        data = {key: torch.from_numpy(content[key]) for key in content}
    inputs, expected = ([data[f"{name}{level}"] for level in range(4)] for name in "xy")
    projector = projector_from_official(official)
    with torch.no_grad():
        for outputs in (projector(inputs), projector(inputs), projector.train()(inputs)):  # the second is cached
            for out, golden in zip(outputs, expected, strict=True):
                assert (out - golden).abs().max() <= 1e-5 * golden.abs().max()


def test_the_converted_weights_are_copies(official: dict[str, Tensor]) -> None:
    before = {key: value.clone() for key, value in official.items()}
    projector = projector_from_official(official)
    assert not projector.training
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in official.items())


def small(**changes: Tensor | None) -> dict[str, Tensor]:
    """A checkpoint of two levels of 16 channels; a change replaces a key (``__`` for ``.``) or, None, removes it."""
    checkpoint: dict[str, Tensor] = released_state(16, levels=2, references=8, hidden=64, reduced=8, scale=1.0)
    for key, value in changes.items():
        if value is None:
            del checkpoint[key.replace("__", ".")]
        else:
            checkpoint[key.replace("__", ".")] = value
    return checkpoint


def test_other_sizes_convert() -> None:
    projector = projector_from_official(small())
    assert isinstance(projector, FeatureProjector)
    assert [out.shape for out in projector([torch.randn(1, 16, 2, 2)] * 2)] == [(1, 16, 2, 2)] * 2


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"state": torch.zeros(1)}, r"'state' is not a key of a released ADPretrain projector.*l1_proj\.x_ref"),
        ({}, r"expected levels l1, l2, \.\.\.; found \[\]"),
        ({k: v for k, v in small().items() if k.startswith("l2")}, r"found \[2\]"),
        (
            small(l1_proj__layers__1__mlp__fc1__bias=torch.zeros(64)),
            r"'l1_proj\.layers\.1\.mlp\.fc1\.bias' is not a key",
        ),
        (small(l2_proj__x_ref=None), r"level l2 of the checkpoint lacks \['x_ref'\]"),
        (
            small(l2_proj__layers__0__mlp__fc2__bias=torch.zeros(17)),
            r"(?s)shapes are not.*levels\.1\.mlp\.0\.fc2\.bias",
        ),
        (small(l1_proj__x_ref=torch.zeros(8, 16)), r"l1_proj\.x_ref is \[8, 16\], expected \[1, N_r, C\]"),
        (small(l2_proj__x_ref=torch.zeros(1, 9, 16)), r"(?s)shapes are not.*levels\.1\.references"),
        (
            small(l1_proj__layers__0__cross_attn__in_proj_weight=torch.zeros(5, 16)),
            r"in_proj_weight is \[5, 16\], expected \[48, 16\]",
        ),
    ],
)
def test_what_is_not_such_a_checkpoint_is_refused(checkpoint: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        projector_from_official(checkpoint)
