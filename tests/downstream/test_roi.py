"""The region of interest: what is outside is neither scored, matched nor learnt, by any detector.

The features are those of the first stages of Lite0, whose receptive fields end some 50 pixels from the far strip of an
image of 96 pixels; the region is the 32 columns on the left.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from adpretrain.backbones import Backbone, load_backbone
from adpretrain.extractor import ADExtractor
from adpretrain.local_scale import LocalScale
from adpretrain.preprocess import Preprocess
from downstream.detector import Detector
from downstream.detectors import DETECTORS, detector_from_pretrained
from downstream.detectors.aligned import AlignedFeatureNorm, AlignedFeatureNormConfig
from downstream.detectors.anomalydino import AnomalyDINO, AnomalyDINOConfig
from downstream.detectors.cflow import CFLOW, CFLOWConfig
from downstream.detectors.dinomaly import Dinomaly, DinomalyConfig
from downstream.detectors.ensemble import Ensemble
from downstream.detectors.featurenorm import FeatureNorm, FeatureNormConfig
from downstream.detectors.glass import GLASS, GLASSConfig
from downstream.detectors.musc import MuSc, MuScConfig
from downstream.detectors.padim import PaDiM, PaDiMConfig
from downstream.detectors.patchcore import PatchCore, PatchCoreConfig
from downstream.detectors.rd4ad import RD4AD
from downstream.detectors.reconpatch import ReConPatch, ReConPatchConfig
from downstream.detectors.reconpatch.representation import RepresentationConfig
from downstream.detectors.recontrast import ReContrast, ReContrastConfig
from downstream.detectors.refined import Refined, RefinementConfig
from downstream.detectors.refined.simulation import SimulationConfig
from downstream.detectors.spade import SPADE, SPADEConfig
from downstream.detectors.subspacead import SubspaceAD
from downstream.detectors.uniad import UniAD, UniADConfig
from downstream.embedding import EmbeddingConfig
from downstream.lessons import LearningConfig
from downstream.maps import upsample
from downstream.roi import RegionOfInterest, RoiFiles, ignore_border

SIDE, EDGE = 96, 32
LEFT = torch.zeros(SIDE, SIDE, dtype=torch.bool)
LEFT[:, :EDGE] = True


@functools.cache
def backbone() -> Backbone:
    return load_backbone("lite0", image_size=SIDE, levels=[1, 2])


def extractor() -> ADExtractor:
    return ADExtractor(backbone(), local_scale=LocalScale(2))


QUICK = RepresentationConfig(dim=8, projection_dim=8, epochs=1, patches_per_step=64)
DEFECTS = SimulationConfig("textural", smallest_area=0.03, smallest_opacity=0.8, normal_share=0.0, cells=4)
NETWORK = RefinementConfig(
    width=8, rates=(1, 2), epochs=12, batch_size=3, learning_rate=0.1, simulation=DEFECTS, stride=4
)
STEPS = LearningConfig(steps=20)
SMALL_DISCRIMINATOR = GLASSConfig(
    hidden=32, climb_steps=5, learning_rate=2e-3, adaptor_rate=1e-3, training=LearningConfig(steps=40)
)
SMALL_TRANSFORMER = UniADConfig(
    grid=12, neighbours=3, width=32, heads=4, layers=1, inner=32, learning_rate=3e-3, training=LearningConfig(steps=60)
)
MAKE: dict[str, Callable[[], Detector]] = {
    "featurenorm": lambda: FeatureNorm(extractor()),
    "aligned-featurenorm": lambda: AlignedFeatureNorm(extractor(), AlignedFeatureNormConfig(shots=2)),
    "patchcore": lambda: PatchCore(backbone()),
    "reconpatch": lambda: ReConPatch(backbone(), ReConPatchConfig(training=QUICK)),
    "padim": lambda: PaDiM(backbone(), PaDiMConfig(EmbeddingConfig(patch=1))),
    "spade": lambda: SPADE(backbone(), SPADEConfig(images=3)),
    "subspacead": lambda: SubspaceAD(backbone()),
    "anomalydino": lambda: AnomalyDINO(backbone(), AnomalyDINOConfig(rotations=3)),
    "musc": lambda: MuSc(backbone(), MuScConfig(degrees=[1, 3])),
    "rd4ad": lambda: RD4AD(backbone(), ReContrastConfig(form="B", training=STEPS)),
    "recontrast": lambda: ReContrast(backbone(), ReContrastConfig(training=STEPS)),
    "dinomaly": lambda: Dinomaly(backbone(), DinomalyConfig([-1], training=STEPS)),
    "cflow": lambda: CFLOW(backbone(), CFLOWConfig(learning_rate=2e-3, training=LearningConfig(steps=30))),
    "glass": lambda: GLASS(backbone(), SMALL_DISCRIMINATOR),
    "uniad": lambda: UniAD(backbone(), SMALL_TRANSFORMER),
    "ensemble": lambda: Ensemble([PatchCore(backbone()), ReConPatch(backbone(), ReConPatchConfig(training=QUICK))]),
    "refined": lambda: Refined(PatchCore(backbone()), NETWORK),
}


def photographs(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def with_anomaly(images: Tensor, left: int) -> Tensor:
    """A flat block of 12 x 40 pixels, where good photographs are noise."""
    images = images.clone()
    images[:, :, 28:68, left : left + 12] = 1.5
    return images


@pytest.fixture(scope="module")
def fitted() -> Callable[[str, bool], Detector]:
    """fitted(name, with_roi), each fitted once; tests do not change them."""
    made: dict[tuple[str, bool], Detector] = {}

    def get(name: str, with_roi: bool) -> Detector:
        if (name, with_roi) not in made:
            roi = {"roi": LEFT} if with_roi else {}
            made[name, with_roi] = MAKE[name]().fit(photographs(6, 0).split(4), **roi)  # type: ignore[arg-type]
        return made[name, with_roi]

    return get


Fitted = Callable[[str, bool], Detector]


def test_every_detector_is_here() -> None:
    # They have tests of their own: tiled takes photographs, and a transformer sees what is outside.
    assert MAKE.keys() == DETECTORS.keys() - {"tiled", "winclip"}


@pytest.mark.parametrize("name", MAKE)
def test_an_anomaly_is_found_inside_and_changes_nothing_far_outside(fitted: Fitted, name: str) -> None:
    good, whole, region = photographs(3, 1), fitted(name, False), fitted(name, True)
    outside, inside = with_anomaly(good, SIDE - 12), with_anomaly(good, 8)
    before, after, found = (region.predict(images) for images in (good, outside, inside))
    torch.testing.assert_close(after.scores, before.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.maps, before.maps, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert torch.equal(before.maps.isnan(), ~LEFT.expand_as(before.maps))
    if name == "refined":  # a network trained for a second sees the block, but does not know yet that it is a defect
        changed = (found.maps - before.maps)[:, 28:68, 8:20].abs()  # logits, where the others changed by 1e-4 at most
        assert bool((changed.mean((1, 2)) > 0.1).all())
        return
    assert bool((whole.predict(outside).scores > whole.predict(good).scores.max()).all())  # it is an anomaly
    assert bool((found.scores > before.scores.max()).all())
    for one in found.maps.nan_to_num(-torch.inf):
        row, column = divmod(int(one.argmax()), SIDE)
        assert 20 <= row < 76
        assert column < 28


@pytest.mark.parametrize("name", MAKE)
def test_the_whole_image_as_region_changes_no_number(fitted: Fitted, name: str) -> None:
    everything = torch.ones(SIDE, SIDE, dtype=torch.bool)
    images, expected = photographs(2, 2), fitted(name, False).predict(photographs(2, 2))
    found = MAKE[name]().fit(photographs(6, 0).split(4), roi=everything).predict(images)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.maps, expected.maps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MAKE)
def test_a_saved_detector_keeps_its_region(fitted: Fitted, name: str, tmp_path: Path) -> None:
    detector, images = fitted(name, True), with_anomaly(photographs(2, 2), 40)
    loaded = detector_from_pretrained(detector.save_pretrained(tmp_path / name))
    assert loaded.roi is not None
    assert torch.equal(loaded.roi, LEFT)
    found, expected = loaded.predict(images), detector.predict(images)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.maps[:, LEFT], expected.maps[:, LEFT])
    assert bool(found.maps[:, ~LEFT].isnan().all())


REGIONS = torch.stack([LEFT, LEFT, LEFT.T, LEFT.T, LEFT, LEFT])


@pytest.mark.parametrize("name", [name for name in MAKE if name not in ("padim", "refined")])
def test_a_region_for_every_image(name: str, tmp_path: Path) -> None:
    """Anomalies outside the normal images' own regions are not learnt: with them the detector is the same."""
    normal = photographs(6, 0)
    spoilt = normal.clone()
    spoilt[[0, 1, 4, 5], :, :, -12:] = 1.5
    spoilt[2:4, :, -12:] = 1.5
    detector = MAKE[name]().fit(normal.split(4), roi=REGIONS)
    images, regions = photographs(2, 1), torch.stack([LEFT.T, LEFT])
    found = detector.predict(images, regions)
    loaded = detector_from_pretrained(detector.save_pretrained(tmp_path / name))
    assert torch.equal(loaded.predict(images, regions).scores, found.scores)
    for same in (detector, MAKE[name]().fit(spoilt.split(4), roi=REGIONS)):
        for image, roi, score, one in zip(images, regions, found.scores, found.maps, strict=True):
            alone = same.predict(image[None], roi)
            torch.testing.assert_close(alone.scores[0], score, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(alone.maps[0], one, rtol=1e-3, atol=1e-3, equal_nan=True)
    for unprepared in (detector, loaded):
        with pytest.raises(ValueError, match=r"fitted with a region of interest for each image: give predict one"):
            unprepared.predict(images)


def nearest(query_QC: Tensor, rows_NC: Tensor) -> tuple[Tensor, Tensor]:
    distance = torch.cdist(query_QC.double(), rows_NC.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return distance.min(1)


@pytest.mark.parametrize("share", [None, 0.25])
def test_featurenorm_by_hand(share: float | None) -> None:
    """Nearest inside reference -> norm -> the column at the edge continued -> upsampled, scipy's Gaussian -> the
    highest 1 % of the inspected pixels."""
    network, normal, images = backbone(), photographs(3, 0), photographs(2, 1)
    scale = None if share is None else LocalScale(2, replace(LocalScale(2).config, share=share))
    extract = ADExtractor(network, local_scale=scale)
    total = np.zeros((2, SIDE, SIDE))
    for level, shots in zip(network(images), network(normal), strict=True):
        cells = level.shape[2] * EDGE // SIDE
        inner = [shot[:, :, :cells].flatten(1).T for shot in shots]  # [T, C] of each reference
        rows, queries = torch.cat(inner), level[:, :, :, :cells].permute(0, 2, 3, 1)
        divisors = torch.ones(len(rows), dtype=torch.float64)
        if share is not None:
            norms = [nearest(own, torch.cat(inner[:i] + inner[i + 1 :]))[0] for i, own in enumerate(inner)]
            divisors = torch.cat([around(one.view(-1, cells), share, torch.cat(norms).mean()) for one in norms])
        distance, index = nearest(queries.flatten(0, 2), rows)
        norm = (distance / divisors[index]).view(2, level.shape[2], cells)
        norm = torch.cat([norm, norm[:, :, -1:].expand(-1, -1, level.shape[3] - cells)], 2)
        total += upsample(norm, SIDE, align_corners=True).numpy() / 2
    detector = FeatureNorm(extract, FeatureNormConfig(top=0.01)).fit([normal], roi=LEFT)
    found = detector.predict(images)
    for image in range(2):
        expected = gaussian_filter(total[image], 4.0)[:, :EDGE]
        np.testing.assert_allclose(found.maps[image, :, :EDGE].numpy(), expected, rtol=1e-3)
        highest = np.sort(expected.ravel())[-round(0.01 * SIDE * EDGE) :].mean()
        assert float(found.scores[image]) == pytest.approx(highest, rel=1e-3)


def around(norms_HW: Tensor, share: float, mean: Tensor) -> Tensor:
    """The local scale by loops: neighbours outside the photograph are those at its border, others outside are left out;
    the weight of a row or column at the border is that of replicated padding."""
    height, width = norms_HW.shape
    out = []
    for y in range(height):
        for x in range(width):
            values = [
                norms_HW[min(max(y + dy, 0), height - 1), max(x + dx, 0)]
                for dy in (-1, 0, 1)
                for dx in (-1, 0, 1)
                if x + dx < width
            ]
            out.append(share * torch.stack(values).mean() + (1 - share) * mean)
    return torch.stack(out)


def test_leave_one_out_is_a_prediction_without_the_photograph() -> None:
    normal = photographs(3, 3)
    regions = torch.stack([LEFT, LEFT.T, LEFT])
    for roi in (LEFT, regions):
        found = FeatureNorm(extractor()).fit([normal], roi=roi).leave_one_out(normal, roi)
        for image in range(3):
            rest = [other for other in range(3) if other != image]
            own, others = (roi, roi) if roi is LEFT else (roi[image], roi[rest])
            alone = FeatureNorm(extractor()).fit([normal[rest]], roi=others).predict(normal[image : image + 1], own)
            torch.testing.assert_close(found.scores[image], alone.scores[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.maps[image], alone.maps[0], rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_the_bank_of_patchcore_by_hand(keep: float) -> None:
    config = PatchCoreConfig(method="none", reweight=0, keep=keep)
    detector = PatchCore(backbone(), config).fit(photographs(6, 0).split(4), roi=REGIONS)
    rows = []
    for image, roi in zip(photographs(6, 0), REGIONS, strict=True):
        (embedded_HWD,) = detector.embedding(backbone()(image[None]))
        cells = [(y, x) for y in range(12) for x in range(12) if roi[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].sum() >= 32]
        rows.append(torch.stack([embedded_HWD[cell] for cell in cells]))
    assert len(detector.bank_ND) == 6 * round(keep * 12 * 4)
    distance, _ = nearest(detector.bank_ND, torch.cat(rows))
    assert float(distance.max()) < 1e-3  # of rows some 10 apart
    if keep == 1.0:
        torch.testing.assert_close(detector.bank_ND, torch.cat(rows), rtol=1e-4, atol=1e-4)
        query = photographs(1, 1)
        inside = detector.embedding(backbone()(query))[0, :, :4].flatten(0, 1)
        expected = nearest(inside, torch.cat(rows))[0].max()
        assert float(detector.predict(query, LEFT).scores[0]) == pytest.approx(float(expected), rel=1e-4)


def test_references_given_to_an_extractor_are_matched_inside_only() -> None:
    normal, spoilt = photographs(3, 0), with_anomaly(photographs(3, 0), SIDE - 12)
    for detector in (PatchCore, SPADE):
        first, second = (
            detector(extractor().set_references(one)).fit([photographs(4, 1)], roi=LEFT).predict(photographs(2, 2))
            for one in (normal, spoilt)
        )
        torch.testing.assert_close(first.scores, second.scores, rtol=1e-4, atol=1e-5)


def test_a_token_is_inside_if_half_of_its_cell_is() -> None:
    pixels = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0)) < torch.tensor([0.3, 0.5, 0.7]).view(
        3, 1, 1
    )
    found = RegionOfInterest(pixels).inside(torch.zeros(3, 5, 10))
    for image, row, column in np.ndindex(3, 5, 10):
        cell = pixels[image, 4 * row : 4 * row + 4, 2 * column : 2 * column + 2]
        assert bool(found[image, row, column]) == (int(cell.sum()) >= 4)


def test_outside_tokens_take_the_value_of_a_nearest_inside_one() -> None:
    inside = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(1)) < 0.2
    grid = torch.arange(162.0).view(2, 9, 9)
    filled = RegionOfInterest(inside).filled(grid)
    for image, y, x in np.ndindex(2, 9, 9):
        distances = {float(grid[image, v, u]): (v - y) ** 2 + (u - x) ** 2 for v, u in inside[image].nonzero().tolist()}
        assert distances[float(filled[image, y, x])] == min(distances.values())


def test_a_mask_from_a_file_and_a_border(tmp_path: Path) -> None:
    painted = np.zeros((60, 80), np.uint8)
    painted[:, :40] = 255
    Image.fromarray(painted).save(tmp_path / "mask.png")
    mask = RoiFiles(tmp_path / "mask.png", 6).of(Path("any.jpg"), (80, 60))
    assert mask is not None
    roi = Preprocess(40).mask(mask)
    expected = np.zeros((40, 40), bool)
    expected[4:36, 3:20] = True  # 6 of 60 rows are 4 of 40, 6 of 80 columns are 3 of 40
    np.testing.assert_array_equal(roi.numpy(), expected)
    border = Preprocess(40).mask(ignore_border((80, 60), 6))
    assert int(border.sum()) == 32 * 34
    assert bool(border[4:36, 3:37].all())
    with pytest.raises(
        ValueError, match="a border of 30 pixels leaves nothing of a photograph of 80x60: choose 0 to 29"
    ):
        ignore_border((80, 60), 30)
    Image.fromarray(0 * painted).save(tmp_path / "black.png")
    with pytest.raises(ValueError, match=r"black\.png is empty: paint what is inspected white"):
        RoiFiles(tmp_path / "black.png").of(Path("any.jpg"), (80, 60))
    assert RoiFiles().of(Path("any.jpg"), (80, 60)) is None
    for name, side in (("a", 0), ("b", 40)):
        one = 0 * painted
        one[:, side : side + 40] = 255
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(one).save(tmp_path / "masks" / f"{name}.png")
    each = RoiFiles(tmp_path / "masks")
    assert [path.name for path in each.files()] == ["a.png", "b.png"]
    found = each.of(Path("line") / "b.jpg", (160, 120))  # of another size than its mask
    assert found is not None
    assert found.getbbox() == (80, 0, 160, 120)
    with pytest.raises(ValueError, match="no mask named c in"):
        each.of(Path("c.jpg"), (80, 60))
    with pytest.raises(ValueError, match="no mask at"):
        RoiFiles(tmp_path / "nowhere").files()


WRONG: dict[str, tuple[Any, str]] = {
    "numbers": (LEFT.float(), "bool tensor .* got .*float32"),
    "array": (LEFT.numpy(), "bool tensor .* got a ndarray"),
    "side": (LEFT[:64, :64], r"roi has \(64, 64\) pixels but the images \(96, 96\)"),
    "count": (REGIONS[:3], r"3 regions of interest for (at least )?\d images: give each image one"),
    "empty": (torch.zeros(SIDE, SIDE, dtype=torch.bool), "region of interest of 0 pixels covers half of no cell"),
    "line": (torch.arange(SIDE).expand(SIDE, SIDE) == 3, "of 96 pixels covers half of no cell of a .* grid"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["featurenorm", "patchcore"])
def test_mistakes_are_named(fitted: Fitted, name: str, wrong: str) -> None:
    roi, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        MAKE[name]().fit(photographs(6, 0).split(4), roi=roi)
    with pytest.raises(ValueError, match=message):
        fitted(name, False).predict(photographs(2, 1), roi)


def test_too_many_regions_and_regions_for_padim_are_refused() -> None:
    with pytest.raises(ValueError, match="6 regions of interest for 4 images: give each image one"):
        MAKE["patchcore"]().fit(photographs(4, 0).split(2), roi=REGIONS)
    with pytest.raises(ValueError, match="padim compares the same positions of all images"):
        MAKE["padim"]().fit([photographs(6, 0)], roi=REGIONS)
