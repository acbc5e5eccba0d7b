"""Every detector as an ONNX file in ONNX Runtime against its own `predict`, and the parts that are made for graphs.

Difference: of scores and maps, relative to the largest of the images compared; 1e-4 is the promise, 1e-5 is asserted
(float32 sums in another order give about 1e-6).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adpretrain.backbones import Backbone, FeatureMaps
from adpretrain.config import ProjectorConfig
from adpretrain.extractor import ADExtractor
from adpretrain.photographs import read_image
from adpretrain.preprocess import Preprocess
from adpretrain.projector import FeatureProjector
from downstream.cli import main
from downstream.detector import Detector
from downstream.detectors import DETECTORS, build_detector
from downstream.detectors.spade import SPADE, SPADEConfig
from downstream.embedding import EmbeddingConfig
from downstream.extracts import Adapted
from downstream.gaussians import Moments, plain
from downstream.inspection import Options
from downstream.inspection.graph import DetectorGraph
from downstream.inspection.onnx import export_onnx
from downstream.inspection.photos import find_images
from downstream.inspection.set_up import inspector_from_detector
from downstream.neighbours import Neighbours
from downstream.plain_search import PlainNeighbours, plain_nearest

SIDE = 32
PREPROCESS = Preprocess(SIDE, None, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class Small(Backbone):
    """Two convolutions with random weights: levels [B, 8, 8, 8] and [B, 12, 4, 4]."""

    def __init__(self, preprocess: Preprocess = PREPROCESS) -> None:
        generator = torch.Generator().manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 12, 2, 2))
        for parameter in network.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
        super().__init__("small", [8, 12], preprocess, [1, 2], network)

    def maps(self, images: Tensor) -> FeatureMaps:
        fine = F.relu(self.network[0](images))  # type: ignore[index]
        return [fine, F.relu(self.network[1](fine))]  # type: ignore[index]


def drawn(count: int, seed: int) -> Tensor:
    """One smooth picture, varied a little: [count, 3, S, S]."""
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 3, 8, 8, generator=common) + 0.3 * torch.randn(count, 3, 8, 8, generator=own)
    return F.interpolate(coarse, (SIDE, SIDE), mode="bicubic")


def fitted(name: str, options: dict[str, Any], extract: Any = None) -> Detector:
    return build_detector(name, extract or Small(), options).fit([drawn(4, 1), drawn(4, 2)])


def difference(path: Path, detector: Detector, images: Tensor) -> float:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    scores, maps = session.run(["scores", "maps"], {"images": images.numpy()})
    expected = detector.predict(images)
    assert scores.shape == (len(images),)
    assert maps.shape == (len(images), SIDE, SIDE)
    pairs = ((scores, expected.scores.numpy()), (maps, expected.maps.numpy()))
    return max(float(np.abs(theirs - ours).max() / np.abs(ours).max()) for theirs, ours in pairs)


SMALL_TRAINING = {"epochs": 1, "dim": 16, "projection_dim": 8, "patches_per_step": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "featurenorm on a raw backbone": ("featurenorm", {}),
    "patchcore": ("patchcore", {}),
    "patchcore without weights, squared": ("patchcore", {"reweight": 0, "squared": True}),
    "patchcore with all weights": ("patchcore", {"reweight_all": True}),
    "patchcore, fewer neighbours than rows": ("patchcore", {"reweight": 3, "amount": 40, "sigma": 0.0}),
    "patchcore in the released form": (
        "patchcore",
        {"embedding": {"level_dim": 5, "target_dim": 7, "form": "released"}},
    ),
    "reconpatch": ("reconpatch", {"memory": {"amount": 0.1}, "training": SMALL_TRAINING}),
    "padim, more images than channels": ("padim", {"embedding": {"target_dim": 4}}),
    "padim, fewer images than channels": ("padim", {"embedding": {"target_dim": 16, "reduction": "orthogonal"}}),
    "padim for each level": ("padim", {"per_level": True, "embedding": {"target_dim": None, "reduction": "pool"}}),
    "spade": ("spade", {"images": 3, "patches": 2}),
    "subspacead": ("subspacead", {"rotations": 2}),
    "anomalydino": ("anomalydino", {"rotations": 3}),
    "musc": ("musc", {}),
    "rd4ad": ("rd4ad", {"training": {"steps": 2}}),
    "recontrast": ("recontrast", {"training": {"steps": 2}}),
    "recontrast, one encoder, the mean": ("recontrast", {"form": "D", "top": 1.0, "training": {"steps": 2}}),
    "dinomaly": ("dinomaly", {"levels": [0], "depth": 2, "training": {"steps": 2}}),
    "cflow": ("cflow", {"training": {"steps": 20}}),
    "uniad": ("uniad", {"grid": 8, "width": 32, "layers": 2, "training": {"steps": 5}}),
    "glass": ("glass", {"hidden": 16, "climb_steps": 1, "training": {"steps": 5}}),
    "ensemble": ("ensemble", {"members": [{"detector": "featurenorm"}, {"detector": "patchcore"}]}),
    "refined": ("refined", {"detector": "featurenorm", "network": {"epochs": 1, "width": 8}}),
}


def test_there_is_a_case_for_every_detector() -> None:
    # One is refused, tiles are images, and winclip needs a network of its own (test_winclip).
    assert {name for name, _ in CASES.values()} == {*DETECTORS} - {"aligned-featurenorm", "tiled", "winclip"}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_onnx_runtime_gives_what_predict_gives(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    detector, images = fitted(name, options), drawn(3, 3)
    images[1, :, 8:16, 8:16] += 3  # a defect
    done = export_onnx(detector, tmp_path / "model.onnx", [images])
    assert done.agreement.images == 7
    assert done.agreement.difference < 1e-5
    assert not done.agreement.ties
    for batch in (images[1:2], images):
        assert difference(done.path, detector, batch) < 1e-5
    told = onnxruntime.InferenceSession(done.path).get_modelmeta().custom_metadata_map
    described = json.loads(told["detector"])
    assert described["name"] == name
    assert Preprocess(**json.loads(told["preprocess"])) == PREPROCESS
    if name == "ensemble":
        assert [member["name"] for member in described["members"]] == ["featurenorm", "patchcore"]
        assert described["members"][1]["backbone"]["name"] == "small"
    elif name == "patchcore":
        assert described["options"]["reweight"] == options.get("reweight", 9)
        assert json.loads(told["backbone"])["name"] == "small"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "matching"), [("patchcore", "l2"), ("padim", "cosine"), ("featurenorm", "none")])
def test_on_an_extractor(name: str, matching: str, tmp_path: Path) -> None:
    """Residuals and a projector, before a detector that was fitted on them; "none" has no references."""
    torch.manual_seed(0)
    projector = FeatureProjector([8, 12], ProjectorConfig("learnable_kv", references=16, heads=2, mlp_ratio=1.0))
    for parameter in projector.parameters():  # untrained, it would return its input
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    extractor = ADExtractor(Small(), projector, matching=matching)
    if matching != "none":
        extractor.set_references(drawn(2, 4))
    options = {"embedding": {"target_dim": 16}} if name == "padim" else {}
    detector = fitted(name, options, extractor)
    done = export_onnx(detector, tmp_path / "model.onnx", [drawn(3, 3)])
    assert done.agreement.difference < 1e-5
    extractor.set_references(drawn(2, 5))  # the detector keeps its own
    assert difference(done.path, detector, drawn(3, 6)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("side", [SIDE, SIDE // 2])
def test_a_member_with_a_network_of_its_own(side: int, tmp_path: Path) -> None:
    """The ensemble's images are normalised, and resized, for the member's network inside the graph."""
    given = Preprocess(side, None, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    detector = build_detector("padim", Adapted(Small(), given), {"embedding": {"target_dim": 4}})
    images = F.interpolate(drawn(11, 1), (side, side), mode="area")
    detector.fit([images[:8]])
    done = export_onnx(detector, tmp_path / "model.onnx", [images[8:]])
    assert done.agreement.difference < 1e-5


def test_a_failed_choice_is_told_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for detector, message in (
        (build_detector("patchcore", Small(), {}), "PatchCore is not fitted"),
        (fitted("patchcore", {"amount": 300, "search": "ivfpq"}), "search 'ivfpq' cannot be exported: .* 'exact'"),
        (fitted("patchcore", {}, lambda images: [F.avg_pool2d(images, 4)]), "features of a function that does not say"),
        (fitted("aligned-featurenorm", {"shots": 2}, ADExtractor(Wide())), "which a graph cannot do"),
    ):
        with pytest.raises(ValueError, match=message):
            export_onnx(detector, path, [drawn(2, 3)])
    assert list(tmp_path.iterdir()) == []


class Wide(Small):
    """Levels of at least 5 x 5 tokens, as the alignment needs."""

    def maps(self, images: Tensor) -> FeatureMaps:
        fine, coarse = super().maps(images)
        return [fine, F.interpolate(coarse, (8, 8))]


# The parts that are made for graphs


@pytest.mark.parametrize("k", [1, 5])
def test_the_plain_search_finds_what_the_exact_one_finds(k: int) -> None:
    """Rows far from the origin, where products cancel: the distances stay those of differences."""
    generator = torch.Generator().manual_seed(0)
    bank, query = (100 + torch.randn(count, 20, generator=generator) for count in (500, 40))
    query[:10] = bank[:10]
    distance, index = Neighbours(bank).search(query, k)
    for found, where in (PlainNeighbours(bank).search(query, k), plain_nearest(query, bank, k)):
        torch.testing.assert_close(found, distance, rtol=1e-5, atol=0)
        assert torch.equal(where, index)
    batched = plain_nearest(query.view(2, 20, 20), torch.stack([bank, bank.flip(0)]), k)
    torch.testing.assert_close(batched[0].flatten(0, 1), distance, rtol=1e-5, atol=0)
    assert torch.equal(batched[1][1], len(bank) - 1 - index[20:])


@pytest.mark.parametrize("images", [6, 40])
def test_plain_gaussians_give_the_same_distances(images: int) -> None:
    """With fewer and with more images than the 12 channels, for new images and for those of the fit, where they
    cancel; numpy's inverse in float64 is the third opinion."""
    generator = torch.Generator().manual_seed(0)
    normal, new = (10 * torch.randn(count, 5, 12, generator=generator) for count in (images, 3))
    moments = Moments(images)
    moments.add(normal)
    gaussians = moments.gaussians(0.01)
    assert gaussians.low_rank == (images < 12)
    covariance = np.stack([np.cov(normal[:, p].double().numpy(), rowvar=False) + 0.01 * np.eye(12) for p in range(5)])
    delta = (new.double() - normal.double().mean(0)).numpy()
    expected = np.sqrt(np.einsum("bpd,pde,bpe->bp", delta, np.linalg.inv(covariance), delta))
    np.testing.assert_allclose(plain(gaussians).distances(new), expected, rtol=1e-4)
    for rows in (new, normal):
        torch.testing.assert_close(plain(gaussians).distances(rows), gaussians.distances(rows), rtol=1e-3, atol=0)


def test_a_tie_of_normal_images_is_seen() -> None:
    """SPADE with one neighbour: two normal images have the same mean, and so descriptor, but other patches."""
    backbone, generator = Small(), torch.Generator().manual_seed(0)
    for layer in backbone.network:  # type: ignore[union-attr]
        layer.weight.data = torch.rand(layer.weight.shape, generator=generator)  # nothing is below 0: all is linear
        nn.init.zeros_(layer.bias)
    stripes = torch.arange(SIDE) // 8 % 2 - torch.full((1, 3, SIDE, SIDE), 0.5)
    normal = torch.cat([1 + stripes, 1 + 0.1 * stripes, torch.full_like(stripes, 3.0)])
    image = 1.1 + 0.3 * stripes

    def ties(images: int, rows: Tensor) -> bool:
        config = SPADEConfig(EmbeddingConfig(levels=[0], patch=1), images=images)
        return bool(DetectorGraph(SPADE(backbone, config).fit([rows])).ties(image))

    assert ties(1, normal)
    assert not ties(2, normal)  # both are taken
    assert not ties(1, normal[1:])


@pytest.mark.slow
def test_the_command_exports_a_fitted_detector(
    write_tiles: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    normal, further = write_tiles("shots", range(6)), write_tiles("further", range(6, 12))
    raw = ["--backbone", "lite0", "--levels", "[2]", "--image-size", "64", "--device", "cpu"]
    assert main(["fit", "--detector", "patchcore", *raw, "--normal", str(normal), "--out", str(tmp_path / "fit")]) == 0
    base = ["export", "--detector", str(tmp_path / "fit"), "--normal", str(further), "--device", "cpu", "--out"]
    model = tmp_path / "model.onnx"
    assert main([*base, str(model), "--shots", "3"]) == 2
    assert "--shots cannot be given with --detector" in capsys.readouterr().err
    assert main([*base, str(model), "--false-alarm-rate", "0.2"]) == 0
    out = capsys.readouterr().out
    assert "patchcore on lite0, fitted before, threshold" in out
    assert "the file contains features of the photographs that the detector was fitted on" in out

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    options = Options(false_alarm_rate=0.2)
    inspector = inspector_from_detector(tmp_path / "fit", torch.device("cpu"), further, options=options)
    assert float(told["threshold"]) == inspector.threshold
    assert 0 < float(told["promised_false_alarm_rate"]) <= 0.2
    images = torch.stack([inspector.reader.preprocess(read_image(path)) for path in find_images(normal)])
    scores = session.run(["scores"], {"images": images.numpy()})[0]
    np.testing.assert_allclose(scores, inspector.detector.predict(images).scores, rtol=1e-4, atol=1e-4)
