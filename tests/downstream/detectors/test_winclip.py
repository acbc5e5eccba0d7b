"""WinCLIP on a small random CLIP: its windows and maps by loops, what sentences and photographs add."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adpretrain.backbones import Backbone
from downstream.clip_windows import ClipWindows
from downstream.detectors import build_detector, detector_from_pretrained
from downstream.detectors.winclip import DAMAGED, FLAWLESS, WinCLIP, WinCLIPConfig, on_patches, sentences
from downstream.inspection.graph import DetectorGraph
from downstream.inspection.onnx import export_onnx

open_clip = pytest.importorskip("open_clip")
SIDE, GRID = 80, 5


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vision = {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": SIDE // GRID}
        text = {"width": 32, "heads": 2, "layers": 1}
        made = open_clip.CLIP(24, vision, text).eval()
        nn.init.normal_(made.visual.positional_embedding)  # untrained positions are nearly nothing
        return made


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def alone(model: Any, image: Tensor, patches: list[int]) -> np.ndarray:
    """A window by hand: class token and patches, with their positions, normalised, through the tower: [D]."""
    visual = model.visual
    tokens = visual.conv1(image[None]).flatten(2).mT[0]
    tokens = torch.cat([visual.class_embedding[None], tokens]) + visual.positional_embedding
    chosen = visual.ln_pre(tokens[[0, *(number + 1 for number in patches)]])
    out = visual.ln_post(visual.transformer(chosen[None]))[0, 0] @ visual.proj
    return out.double().numpy()


def test_levels_are_image_windows_and_patches(model: Any) -> None:
    batch = images(2, 0)
    whole, two, three, patches = ClipWindows(model)(batch)
    torch.testing.assert_close(whole[:, :, 0, 0], model.encode_image(batch), rtol=1e-4, atol=1e-5)
    assert [tuple(level.shape) for level in (two, three, patches)] == [(2, 24, 4, 4), (2, 24, 3, 3), (2, 32, 5, 5)]
    for level, side in ((two, 2), (three, 3)):
        for image, y, x in np.ndindex(2, GRID - side + 1, GRID - side + 1):
            window = [GRID * (y + dy) + x + dx for dy in range(side) for dx in range(side)]
            found = level[image, :, y, x].double().numpy()
            np.testing.assert_allclose(found, alone(model, batch[image], window), rtol=1e-3, atol=1e-5)
    largest = ClipWindows(model, [GRID])(batch)
    torch.testing.assert_close(largest[1], whole, rtol=1e-4, atol=1e-5)  # a window of all patches is the image


def test_a_window_sees_nothing_else(model: Any) -> None:
    batch = images(1, 0)
    spoilt = batch.clone()
    spoilt[:, :, :, 48:] = 9.0  # the patches of the last two columns
    before, after = (ClipWindows(model)(x) for x in (batch, spoilt))
    torch.testing.assert_close(before[1][..., :2], after[1][..., :2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(before[2][..., 0], after[2][..., 0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before[1][..., 2:], after[1][..., 2:], rtol=0.1)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_harmonic_means_of_windows(side: int) -> None:
    scores = torch.rand(2, 6 - side + 1, 5 - side + 1, generator=torch.Generator().manual_seed(0))
    scores[0, 0, 0] = 0.0  # the harmonic mean with a zero is zero
    found = on_patches(scores, (6, 5))
    for image, y, x in np.ndindex(2, 6, 5):
        covering = [
            float(scores[image, v, u])
            for v, u in np.ndindex(*scores.shape[1:])
            if v <= y < v + side and u <= x < u + side
        ]
        expected = 0.0 if min(covering) == 0 else len(covering) / sum(1 / score for score in covering)
        assert float(found[image, y, x]) == pytest.approx(expected, rel=1e-5)


def test_sentences_mean_what_they_are_encoded_as(model: Any) -> None:
    flawless, damaged = sentences("metal nut", FLAWLESS), sentences("metal nut", DAMAGED)
    assert len(flawless) == 7 * 22
    assert len(damaged) == 4 * 22
    assert len({*flawless, *damaged}) == 11 * 22
    assert {"a cropped photo of the flawless metal nut.", "a photo of a large metal nut without flaw."} < {*flawless}
    assert "a photo of the metal nut with damage for anomaly detection." in damaged
    with torch.no_grad():
        each = torch.stack([model.encode_text(open_clip.tokenize([one]))[0] for one in damaged])
    expected = F.normalize(each.mean(0), dim=0)
    torch.testing.assert_close(ClipWindows(model).meaning(damaged), expected, rtol=1e-4, atol=1e-5)


def cosines(left: Tensor, right: Tensor) -> Tensor:
    return F.normalize(left.double(), dim=-1) @ F.normalize(right.double(), dim=-1).T


@pytest.mark.parametrize("shots", [0, 2])
def test_maps_and_scores_by_hand(model: Any, shots: int) -> None:
    extract, batch, normal = ClipWindows(model), images(3, 1), images(2, 2)
    detector = WinCLIP(extract, WinCLIPConfig("bolt"))
    found = (detector.fit(normal.split(1)) if shots else detector).predict(batch)
    meanings = torch.stack([extract.meaning(sentences("bolt", states)) for states in (FLAWLESS, DAMAGED)])
    whole, *windows, patches = (level.permute(0, 2, 3, 1) for level in extract(batch))
    damaged = [(cosines(level, meanings) / 0.07).softmax(-1)[..., 1] for level in (whole, *windows)]
    grids = [damaged[0].expand(3, GRID, GRID), *(on_patches(level, (GRID, GRID)) for level in damaged[1:])]
    grid, scores = 3 / sum(1 / one for one in grids), damaged[0][:, 0, 0]
    if shots:
        known = [level.permute(0, 2, 3, 1).flatten(0, 2) for level in extract(normal)[1:]]
        far = [(1 - cosines(level, rows)).amin(-1) / 2 for level, rows in zip((*windows, patches), known, strict=True)]
        near = sum([on_patches(one, (GRID, GRID)) for one in far[:-1]], far[-1]) / 3
        grid, scores = (grid + near) / 2, (scores + near.amax((1, 2))) / 2
    maps = F.interpolate(grid[:, None], (SIDE, SIDE), mode="bilinear", align_corners=False)[:, 0]
    np.testing.assert_allclose(found.maps.numpy(), maps.numpy(), rtol=1e-3)
    np.testing.assert_allclose(found.scores.numpy(), scores.numpy(), rtol=1e-3)


def test_normal_photographs_make_a_mark_visible(model: Any) -> None:
    normal = images(2, 0)
    marked = normal[:1].clone()
    marked[:, :, 32:48, 48:64] = 4.0  # the patch in row 2, column 3
    detector = WinCLIP(ClipWindows(model)).fit([normal])
    plain, found = detector.predict(normal[:1]), detector.predict(marked)
    assert float(found.scores) > float(plain.scores)
    row, column = divmod(int((found.maps - plain.maps).argmax()), SIDE)
    assert 24 <= row < 56
    assert 40 <= column < 72


def test_a_region_of_interest(model: Any) -> None:
    roi = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    roi[:, :48] = True
    extract, batch = ClipWindows(model), images(2, 1)
    found = WinCLIP(extract).predict(batch, roi)
    assert bool(found.maps[:, ~roi].isnan().all())
    assert bool(found.maps[:, roi].isfinite().all())
    with_normal = WinCLIP(extract).fit([images(2, 2)], roi=roi)
    assert [len(bank) for bank in with_normal.banks] == [2 * 4 * 2, 2 * 3 * 2, 2 * 5 * 3]
    assert bool(with_normal.predict(batch).maps[:, ~roi].isnan().all())


@pytest.mark.parametrize("shots", [0, 2])
def test_saved_and_exported(model: Any, tmp_path: Path, shots: int) -> None:
    extract, batch = ClipWindows(model), images(2, 1)
    detector = WinCLIP(extract, WinCLIPConfig("bolt"))
    if shots:
        detector.fit([images(2, 2)])
    found = detector.predict(batch)
    folder = detector.save_pretrained(tmp_path / "winclip")
    with pytest.raises(ValueError, match="pass the same one as extract="):
        detector_from_pretrained(folder)
    again = detector_from_pretrained(folder, extract).predict(batch)
    assert torch.equal(again.maps, found.maps)
    assert torch.equal(again.scores, found.scores)
    scores, maps = DetectorGraph(detector)(batch)
    torch.testing.assert_close(scores, found.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps, found.maps, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_onnx_runtime_gives_what_predict_gives(model: Any, tmp_path: Path) -> None:
    detector = WinCLIP(ClipWindows(model), WinCLIPConfig("bolt")).fit([images(2, 2)])
    done = export_onnx(detector, tmp_path / "model.onnx", [images(3, 1)])
    assert done.agreement.difference < 1e-5


def test_mistakes_are_named(model: Any, backbone: Backbone) -> None:
    with pytest.raises(ValueError, match=r"winclip reads sentences, which a Stages cannot: .*ClipWindows\(model\)"):
        build_detector("winclip", backbone, {})
    with pytest.raises(ValueError, match=r"needs an open_clip model with a vision transformer .* not a Linear"):
        ClipWindows(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"scales \[6\] must be sides of windows in patches, 1 to 5"):
        ClipWindows(model, [6])
    with pytest.raises(ValueError, match="expected images of 80 pixels"):
        WinCLIP(ClipWindows(model)).extract(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match="product must say what"):
        WinCLIPConfig(" ")
    with pytest.raises(ValueError, match=r"temperature 0\.0 must be positive"):
        WinCLIPConfig(temperature=0.0)
