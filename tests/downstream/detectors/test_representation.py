"""Training f and g: the twin's average, the loss that falls, and what becomes of the distances.

Shapes: n images, H x W patches of an image, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from downstream.detectors.reconpatch.representation import (
    NormalPatches,
    Representation,
    RepresentationConfig,
    train_representation,
    training_loss,
)
from downstream.metrics import auroc

WIDTH, BIG = 24, 5
TINY = RepresentationConfig(
    dim=WIDTH,
    projection_dim=WIDTH,
    epochs=10,
    learning_rate=1e-2,
    images_per_step=4,
    patches_per_step=192,
)


def product(seed: int, defect: float = 0.0, images: int = 24, side: int = 8) -> Tensor:
    """[n, side, side, WIDTH] patches that vary much in BIG directions and little in the others; a defect is a step
    in the latter. The directions are the same for every seed."""
    directions = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))[0]
    generator = torch.Generator().manual_seed(seed)
    patches = 0.2 * torch.randn(images, side, side, WIDTH, generator=generator)
    patches[..., :BIG] *= 15
    step = torch.randn(images, side, side, WIDTH - BIG, generator=generator)
    patches[..., BIG:] += defect * step / step.norm(dim=-1, keepdim=True)
    return patches @ directions


def patches_of(images: Tensor, cache_bytes: int = 1 << 30) -> NormalPatches:
    return NormalPatches(lambda: images.split(10), cache_bytes)


def separation(model: Representation) -> float:
    """AUROC of the distance to the nearest patch of the training images: defective against good patches."""
    with torch.no_grad():
        memory, good, bad = (model(product(seed, step)).flatten(0, 2) for seed, step in ((1, 0.0), (2, 0.0), (3, 1.0)))
    scores = torch.cat([torch.cdist(x, memory).amin(1) for x in (good, bad)])
    return auroc(scores.numpy(), np.repeat([0, 1], [len(good), len(bad)]))


@pytest.fixture(scope="module")
def trained() -> tuple[Representation, list[float]]:
    model = Representation(WIDTH, TINY)
    return model, train_representation(model, patches_of(product(1)), TINY)


def test_the_start_changes_no_distance() -> None:
    """As many channels as the embedding, or more: orthogonal, hence PatchCore's own distances."""
    patches = product(1)[0].flatten(0, 1)
    for dim in (WIDTH, 2 * WIDTH):
        model = Representation(WIDTH, replace(TINY, dim=dim))
        torch.testing.assert_close(torch.pdist(model(patches)), torch.pdist(patches))


def test_twin_is_the_moving_average_of_eq_8() -> None:
    model = Representation(6, replace(TINY, dim=4, projection_dim=3))
    expected = {name: weight.double().clone() for name, weight in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for layer in ("f", "g"):
            weight = model.get_parameter(f"{layer}.weight")
            weight.data += torch.randn(weight.shape, generator=generator)
            average = expected[f"slow_{layer}.weight"]
            expected[f"slow_{layer}.weight"] = 0.9 * average + 0.1 * weight.detach().double()
        model.update_twin(0.9)
    for layer in ("slow_f", "slow_g"):
        torch.testing.assert_close(model.get_parameter(f"{layer}.weight").double(), expected[f"{layer}.weight"])


def test_only_f_and_g_are_trained_and_the_twin_follows(trained: tuple[Representation, list[float]]) -> None:
    before, after = Representation(WIDTH, TINY), trained[0]
    assert [name for name, weight in after.named_parameters() if weight.requires_grad] == ["f.weight", "g.weight"]
    for fast, slow in ((after.f, after.slow_f), (after.g, after.slow_g)):
        assert isinstance(fast, torch.nn.Linear)
        assert isinstance(slow, torch.nn.Linear)
    moved = (after.f.weight - before.f.weight).norm().item()
    followed = (after.slow_f.weight - before.slow_f.weight).norm().item()
    assert 0 < followed < 0.2 * moved


def test_training_lowers_the_loss_of_unseen_patches(trained: tuple[Representation, list[float]]) -> None:
    model, losses = trained
    assert len(losses) == TINY.epochs
    assert losses[-1] < losses[0]
    unseen = product(7)[:3].flatten(0, 2)
    start = Representation(WIDTH, TINY)
    start.slow_f, start.slow_g = model.slow_f, model.slow_g  # the same pseudo-labels for both
    # Where alike is what a twin says, part of the loss cannot be lowered; 0.3 of 39 is what training gained here.
    after, before = (training_loss(which, unseen, TINY).item() for which in (model, start))
    assert after < before - 0.3


def test_training_separates_defects_that_normal_variation_hides(trained: tuple[Representation, list[float]]) -> None:
    """Alike patches are gathered along the directions in which the product varies, so these count less."""
    before, after = separation(Representation(WIDTH, TINY)), separation(trained[0])
    assert before < 0.66
    assert after > before + 0.08


def test_the_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    config = replace(TINY, epochs=2)
    torch.manual_seed(123)
    first = _trained_weight(config)
    torch.manual_seed(321)
    global_state = torch.get_rng_state()
    assert torch.equal(first, _trained_weight(config))
    assert torch.equal(torch.get_rng_state(), global_state)  # nobody else's numbers change
    assert not torch.equal(first, _trained_weight(replace(config, seed=1)))


def _trained_weight(config: RepresentationConfig, cache_bytes: int = 1 << 30) -> Tensor:
    model = Representation(WIDTH, config)
    train_representation(model, patches_of(product(1), cache_bytes), config)
    return model.f.weight.detach()


def test_without_room_to_keep_them_embeddings_are_read_every_epoch() -> None:
    images, reads = product(1), []

    def read() -> Iterator[Tensor]:
        reads.append(1)
        yield from images.split(10)

    config = replace(TINY, epochs=3)
    patches = NormalPatches(read, cache_bytes=images[:12].nbytes)
    assert patches.images == 24
    assert patches.kept is None
    steps = [list(patches.steps(config, epoch)) for epoch in range(config.epochs)]
    assert len(reads) == 1 + config.epochs
    # Batches of 10, 10 and 4 images, by fours; of 4 x 64 patches 192 are drawn.
    assert [len(step) for step in steps[0]] == [192, 192, 128] * 2 + [192]
    assert patches.steps_per_epoch(config.images_per_step) == len(steps[0])
    assert not torch.equal(steps[0][0], steps[1][0])
    assert torch.equal(torch.cat(list(patches.maps())), images)
    model = Representation(WIDTH, config)
    losses = train_representation(model, patches, config)
    assert losses[-1] < losses[0]


def test_kept_images_are_all_seen_once_an_epoch_in_a_new_order() -> None:
    images = torch.arange(9.0)[:, None, None, None].expand(9, 2, 2, 1)
    patches = patches_of(images)
    config = replace(TINY, neighbours=1)
    orders = [torch.cat([step[::4, 0] for step in patches.steps(config, epoch)]).tolist() for epoch in range(2)]
    assert [sorted(order) for order in orders] == [list(range(9))] * 2
    assert orders[0] != orders[1]
    assert patches.steps_per_epoch(4) == 3
    assert torch.equal(torch.cat(list(patches.maps())), images)


def test_progress_counts_to_the_end() -> None:
    told: list[tuple[str, int, int]] = []
    patches = NormalPatches(lambda: product(1).split(10), progress=lambda *news: told.append(news))
    train_representation(Representation(WIDTH, TINY), patches, replace(TINY, epochs=1), lambda *news: told.append(news))
    assert [done for what, done, _ in told if what == "embedding normal images"] == [10, 20, 24]
    assert [(done, total) for what, done, total in told if "training" in what] == [(i + 1, 6) for i in range(6)]


def test_without_g_the_loss_sees_f() -> None:
    config = replace(TINY, projection_dim=None)
    model = Representation(WIDTH, config)
    patches = product(1)[0].flatten(0, 1)
    assert torch.equal(model.project(patches), model(patches))
    assert [name for name, weight in model.named_parameters() if weight.requires_grad] == ["f.weight"]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"10 images exceed cache_bytes 100, and an iterator cannot be read again"):
        NormalPatches(lambda: product(1).split(10), cache_bytes=100, repeatable=False)
    with pytest.raises(ValueError, match=r"momentum 1.2 must be in 0..1"):
        RepresentationConfig(momentum=1.2)
    with pytest.raises(ValueError, match=r"projection_dim 0 must be at least 1"):
        RepresentationConfig(projection_dim=0)
    with pytest.raises(ValueError, match=r"learning_rate nan must be positive"):
        RepresentationConfig(learning_rate=float("nan"))
    with pytest.raises(ValueError, match=r"epochs -1"):
        RepresentationConfig(epochs=-1)
    with pytest.raises(ValueError, match=r"neighbours 5 exceed patches_per_step 4"):
        RepresentationConfig(patches_per_step=4)
    with pytest.raises(ValueError, match=r"scale 'max' is unknown"):
        RepresentationConfig(scale="max")  # type: ignore[arg-type]
    wild = replace(TINY, learning_rate=1e30, epochs=2)
    with pytest.raises(ValueError, match=r"the loss of epoch . is (nan|inf): lower learning_rate 1e\+30"):
        train_representation(Representation(WIDTH, wild), patches_of(product(1)), wild)
