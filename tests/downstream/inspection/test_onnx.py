"""The exported inspector in ONNX Runtime, `torch.export` and `torch.compile` against the detector in torch.

Difference: of maps and scores, relative to the largest of the images compared; 1e-4 is the promise, 1e-5 is asserted
(float32 sums in another order give about 1e-6).
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from products import make_synthetic
from torch import Tensor

from adpretrain import __version__
from adpretrain.backbones import load_backbone
from adpretrain.config import ProjectorConfig
from adpretrain.data.layouts.mtd import index_mtd
from adpretrain.data.samples import ImageDataset
from adpretrain.extractor import ADExtractor
from adpretrain.local_scale import LocalScale
from adpretrain.photographs import read_image
from adpretrain.preprocess import Preprocess
from adpretrain.projector import FeatureProjector
from downstream.calibration import calibrate
from downstream.cli import main
from downstream.commands.export import snippet
from downstream.detectors.aligned import AlignedFeatureNorm, AlignedFeatureNormConfig
from downstream.detectors.featurenorm import FeatureNorm, FeatureNormConfig
from downstream.inspection.graph import DetectorGraph
from downstream.inspection.onnx import ANY_BATCH, NOTICE, Agreement, _judge, export_onnx, verify

MTD = Path(__file__).resolve().parents[4] / "shared" / "data" / "mtd"
SIDE = 64
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Synthetic products: "normal" [8, 3, 64, 64] of one of them, "other" [3, ...] of another, "defects" [5, ...]."""
    root = make_synthetic(tmp_path_factory.mktemp("set"), 2, 8, 5, size=SIDE, seed=1, workers=1, progress=False)
    preprocess = load_backbone("lite0", image_size=SIDE).preprocess
    one, other = sorted(root.glob("realiad_256/*"))

    def load(folder: Path, pattern: str, count: int) -> Tensor:
        paths = sorted(folder.glob(f"{pattern}/**/*.jpg"))[:count]
        return torch.stack([preprocess(read_image(path)) for path in paths])

    return {"normal": load(one, "OK", 8), "other": load(other, "OK", 3), "defects": load(one, "NG", 5)}


def extractor_of(
    statistics: Tensor | None,
    architecture: str | None = "learnable_kv",
    matching: str = "l2",
    levels: tuple[int, ...] = (1, 3),
    side: int = SIDE,
) -> ADExtractor:
    """Lite0, with a local scale fitted to the photographs ``statistics`` if given, under a random projector."""
    torch.manual_seed(0)
    backbone = load_backbone("lite0", image_size=side, levels=levels, finest=8)
    scale = LocalScale(len(backbone.channels)).fit([backbone(statistics)]) if statistics is not None else None
    if architecture is None:
        return ADExtractor(backbone, local_scale=scale, matching=matching)
    config = ProjectorConfig(architecture, references=64, heads=4, mlp_ratio=2.0)
    projector = FeatureProjector(backbone.channels, config)
    for parameter in projector.parameters():  # untrained, it would return its input
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return ADExtractor(backbone, projector, scale, matching=matching, provenance={"data": "noise"})


def differences(path: Path, detector: FeatureNorm, images: Tensor) -> list[float]:
    """Of scores and maps, relative to the largest."""
    outputs = onnxruntime.InferenceSession(path).run(["scores", "maps"], {"images": images.numpy()})
    expected = detector.predict(images)
    pairs = zip(outputs, (expected.scores.numpy(), expected.maps.numpy()), strict=True)
    assert outputs[1].shape == (len(images), *images.shape[2:])
    return [float(np.abs(theirs - ours).max() / np.abs(ours).max()) for theirs, ours in pairs]


# Every pair of the four choices occurs: projector, metric, local scale, number of references.
# The first, ("learnable_kv", "l2", True, 4), is that of `test_what_the_file_tells`.
CASES: list[tuple[str | None, str, bool, int]] = [
    (None, "cosine", True, 4),
    (None, "l2", False, 1),
    ("learnable_kv", "cosine", False, 4),
    ("learnable_kv", "cosine", True, 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "matching", "scaled", "shots"), CASES)
def test_onnx_runtime_gives_what_torch_gives(
    photographs: dict[str, Tensor],
    tmp_path: Path,
    architecture: str | None,
    matching: str,
    scaled: bool,
    shots: int,
) -> None:
    extractor = extractor_of(photographs["other"] if scaled else None, architecture, matching, levels=(1,))
    detector = FeatureNorm(extractor, FeatureNormConfig(image_size=SIDE)).fit([photographs["normal"][:shots]])
    done = export_onnx(detector, tmp_path / "model.onnx", [photographs["normal"]])
    assert done.size == (tmp_path / "model.onnx").stat().st_size
    assert done.agreement.images == 17
    assert done.agreement.difference < 1e-5
    for images in (photographs["defects"][:1], photographs["defects"]):
        assert len(images) in (1, 5)
        assert max(differences(done.path, detector, images)) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(not MTD.is_dir(), reason=f"the Magnetic Tile photographs are not in {MTD}")
def test_on_real_photographs(tmp_path: Path) -> None:
    samples = index_mtd(MTD)
    preprocess = load_backbone("lite0", image_size=224).preprocess

    def load(defect: str, start: int, count: int) -> Tensor:
        chosen = [sample for sample in samples if sample.defect == defect]
        chosen = chosen[start :: len(chosen) // count][:count]
        data = ImageDataset(chosen, preprocess)
        return torch.stack([data[index]["image"] for index in range(count)])

    extractor = extractor_of(load("good", 7, 3), levels=(1, 2, 3), side=224)
    detector = FeatureNorm(extractor).fit([load("good", 0, 4)])
    line = torch.cat([load("good", 3, 4), load("blowhole", 0, 3), load("break", 0, 3)])
    done = export_onnx(detector, tmp_path / "model.onnx", [line])
    assert done.agreement.difference < 1e-5
    assert done.agreement.ties <= 3  # of 21 images; 1 or 2, as the processor rounds
    assert max(differences(done.path, detector, line[:1])) < 1e-5
    assert max(differences(done.path, detector, line[3:8])) < 1e-5


@pytest.mark.slow
def test_what_the_file_tells(photographs: dict[str, Tensor], tmp_path: Path) -> None:
    detector = FeatureNorm(extractor_of(photographs["other"]), FeatureNormConfig(image_size=SIDE)).fit(
        [photographs["normal"][:4]]
    )
    calibration = calibrate(detector.leave_one_out(photographs["normal"]).scores.numpy(), rate=0.2)
    path = tmp_path / "model.onnx"
    export_onnx(detector, path, [photographs["defects"]], calibration, opset=18)
    model = onnx.load(path)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [18]
    told = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert Preprocess(**json.loads(told["preprocess"])) == detector.extract.preprocess
    assert float(told["threshold"]) == calibration.threshold
    assert float(told["promised_false_alarm_rate"]) == calibration.rate
    assert json.loads(told["extractor"])["provenance"] == {"data": "noise"}
    assert json.loads(told["extractor"])["backbone"]["name"] == "lite0"
    assert told["library_version"] == __version__
    assert told["notice"] == NOTICE
    # Keys and values are constants: what they are made from is not in the file.
    names = {tuple(initializer.dims) for initializer in model.graph.initializer}
    assert (64, 24) not in names
    assert (24, 64) not in names

    assert max(differences(path, detector, photographs["defects"][:1])) < 1e-5
    assert max(differences(path, detector, photographs["defects"])) < 1e-5

    # Verification: a constant changed by a thousandth is found, and so is a model of other outputs.
    assert verify(path, detector, [photographs["defects"]]).difference < 1e-5
    bank = next(i for i in model.graph.initializer if tuple(i.dims) == (4 * 64, 24))
    changed = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bank) * np.float32(1.001), bank.name)
    bank.CopyFrom(changed)
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(ValueError, match=r"disagrees with torch on \d+ of 11 images, by up to 0\.\d+ of"):
        verify(tmp_path / "changed.onnx", detector, [photographs["defects"]])
    with pytest.raises(ValueError, match="no images"):
        verify(path, detector, [])

    # A failed export leaves the earlier file as it is, and nothing else.
    before = path.read_bytes()
    detector = FeatureNorm(extractor_of(None, None, levels=(1,)), FeatureNormConfig(image_size=SIDE)).fit(
        [photographs["normal"]]
    )
    with pytest.raises(ValueError, match=r"more than the tolerance 1e-12; it was not kept"):
        export_onnx(detector, path, [photographs["defects"]], tolerance=1e-12)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["changed.onnx", "model.onnx"]


@pytest.mark.slow
def test_the_command_and_its_snippet(
    write_tiles: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    normal, further = write_tiles("shots", range(4)), write_tiles("further", range(4, 8))
    bad = write_tiles("bad", range(20, 21), blob=True)
    folder = extractor_of(None, None).save_pretrained(tmp_path / "extractor")
    arguments = ["--extractor", folder, "--normal", normal, "--calibration", further, "--out", tmp_path / "model.onnx"]
    assert main(["export", *map(str, arguments), "--false-alarm-rate", "0.2", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "MiB, 4 references, threshold" in out
    assert "on 9 images (the photographs in batches, mirrored, and one at a time)" in out
    assert "the file contains features of the photographs in" in out

    code = out[out.index("import json") :].strip()
    assert len(code.splitlines()) == 6
    monkeypatch.chdir(tmp_path)
    shutil.copy(bad / "tile_20.png", tmp_path / "photo.png")
    scope: dict[str, Any] = {}
    exec(code, scope)
    detector = FeatureNorm(ADExtractor.from_pretrained(folder), FeatureNormConfig(image_size=SIDE))
    preprocess = detector.extract.preprocess
    paths = [*sorted(normal.iterdir()), tmp_path / "photo.png"]
    pixels = torch.stack([preprocess(read_image(path)) for path in paths])
    expected = detector.fit([pixels[:-1]]).predict(pixels[-1:])
    np.testing.assert_allclose(scope["scores"], expected.scores, rtol=1e-5)
    np.testing.assert_allclose(scope["maps"], expected.maps, rtol=1e-5, atol=1e-5 * float(expected.maps.max()))
    assert scope["scores"][0] > float(scope["told"]["threshold"])


@pytest.mark.parametrize(("image_size", "crop_from"), [(64, None), (64, 73), (57, 64), (60, 64)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_snippet_prepares_a_photograph_as_we_do(
    image_size: int, crop_from: int | None, interpolation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess = Preprocess(image_size, crop_from, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), interpolation)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the camera lay on its side
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    monkeypatch.chdir(tmp_path)
    lines = snippet(Path("model.onnx"), preprocess).splitlines()
    scope: dict[str, Any] = {"json": json, "np": np, "Image": Image, "ImageOps": ImageOps}
    scope["told"] = {"preprocess": json.dumps(preprocess.to_dict())}
    exec("\n".join(lines[2:-1]), scope)
    ours = preprocess(read_image(tmp_path / "photo.png"))
    np.testing.assert_allclose(scope["pixels"].transpose(2, 0, 1), ours, rtol=0, atol=1e-6)


def test_a_tie_is_seen_where_rounding_decides_and_nowhere_else(photographs: dict[str, Tensor]) -> None:
    """Two references equal but for the last bits of one pixel: the tokens of that place are nearly equally near."""
    normal, defects = photographs["normal"], photographs["defects"]
    detector = FeatureNorm(extractor_of(None, None, levels=(1,)), FeatureNormConfig(image_size=SIDE)).fit([normal[:2]])
    alone = DetectorGraph(detector).ties(defects)
    twin = normal[:1] * (1 + 1e-7)
    detector.fit([torch.cat([normal[:1], twin, normal[1:2]])])
    assert not alone.all()
    assert DetectorGraph(detector).ties(defects).all()


def test_a_difference_is_excused_by_ties_in_few_images_only() -> None:
    def judged(differences: list[float], tied: list[bool]) -> Agreement:
        return _judge(torch.tensor([differences, [0.0] * len(differences)]), torch.tensor(tied), 1e-4)

    assert judged([1e-6, 3e-6, 2e-6], [True] * 3) == Agreement(3, pytest.approx(3e-6), 0, 0.0)
    assert judged([1e-6, 1e-2, 2e-6], [False, True, False]) == Agreement(3, pytest.approx(2e-6), 1, pytest.approx(1e-2))
    for differences, tied in (([1e-6, 1e-2, 2e-6], [True, False, True]), ([1e-6, 1e-2], [True, True])):
        with pytest.raises(ValueError, match=rf"disagrees with torch on 1 of {len(tied)} images, by up to 0\.01 of"):
            judged(differences, tied)
    with pytest.raises(ValueError, match="by up to inf"):
        judged([1e-6, torch.inf, 1e-6], [False] * 3)


# torch.export and torch.compile


@pytest.mark.parametrize(
    ("architecture", "matching", "scaled"),
    [(None, "l2", False), ("learnable_kv", "cosine", True), ("self_cross_attention", "l2", True)],
)
def test_torch_export(photographs: dict[str, Tensor], architecture: str | None, matching: str, scaled: bool) -> None:
    extractor = extractor_of(photographs["other"] if scaled else None, architecture, matching, levels=(1,))
    detector = FeatureNorm(extractor, FeatureNormConfig(image_size=SIDE)).fit([photographs["normal"][:4]])
    with torch.no_grad():
        program = torch.export.export(
            DetectorGraph(detector),
            (photographs["normal"][:2],),
            dynamic_shapes=ANY_BATCH,
        )
        for images in (photographs["defects"][:1], photographs["defects"]):
            scores, maps = program.module()(images)
            expected = detector.predict(images)
            torch.testing.assert_close(scores, expected.scores, rtol=1e-5, atol=0)
            torch.testing.assert_close(maps, expected.maps, rtol=1e-4, atol=1e-5)


def same_when_compiled(extractor: ADExtractor, batches: list[Tensor], backend: str) -> None:
    compiled = torch.compile(extractor, backend=backend)
    for images in batches:
        for a, b in zip(compiled(images), extractor(images), strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.slow
def test_torch_compile(photographs: dict[str, Tensor]) -> None:
    """Two batch sizes, then new weights and new references: nothing stale is baked into the graph."""
    torch.compiler.reset()
    extractor = extractor_of(photographs["other"], levels=(1,)).set_references(photographs["normal"][:4])
    batches = [photographs["defects"][:3], photographs["defects"]]
    same_when_compiled(extractor, batches, "aot_eager")
    before = extractor(batches[0])[0]
    for parameter in extractor.projector.parameters():
        parameter.data.mul_(1.1)
    extractor.set_references(photographs["normal"][4:])
    assert not torch.allclose(extractor(batches[0])[0], before, rtol=1e-2)
    same_when_compiled(extractor, batches, "aot_eager")


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_inductor_compiles_what_follows_the_backbone(photographs: dict[str, Tensor]) -> None:
    """Matching, local scale and projector; with the backbone's many kernels the compiler takes minutes."""
    torch.compiler.reset()
    extractor = extractor_of(photographs["other"], levels=(1,)).set_references(photographs["normal"][:4])

    @torch.no_grad()
    def after_backbone(features: list[Tensor]) -> list[Tensor]:
        return extractor.from_encoded(features, extractor.references)

    features = extractor.backbone(photographs["defects"])
    for a, b in zip(torch.compile(after_backbone)(features), extractor(photographs["defects"]), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


# What cannot be exported


def test_errors_say_what_to_do(
    photographs: dict[str, Tensor], extractor_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = extractor_of(None, None)
    with pytest.raises(ValueError, match=r"FeatureNorm is not fitted: call fit\(normal_batches\)"):
        DetectorGraph(FeatureNorm(extractor, FeatureNormConfig(image_size=SIDE)))
    aligned = AlignedFeatureNorm(extractor, AlignedFeatureNormConfig(image_size=SIDE, shots=2)).fit(
        [photographs["normal"]]
    )
    with pytest.raises(ValueError, match="which a graph cannot do: export a FeatureNorm"):
        DetectorGraph(aligned)
    extractor.set_references(extractor.encode_references(photographs["normal"].unflatten(0, (4, 2))))
    with pytest.raises(ValueError, match="one set of references for all images, not 4"):
        DetectorGraph(FeatureNorm(extractor, FeatureNormConfig(image_size=SIDE)))
    detector = FeatureNorm(extractor, FeatureNormConfig(image_size=SIDE)).fit([photographs["normal"]])
    with pytest.raises(ValueError, match=r"opset 9 is not supported; choose one of 18\.\."):
        export_onnx(detector, tmp_path / "model.onnx", [], opset=9)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"onnxscript is needed .*pip install 'adpretrain\[export\]'"):
        export_onnx(detector, tmp_path / "model.onnx", [])
    assert list(tmp_path.iterdir()) == []


def test_wrong_folders_exit_2_before_any_work(
    write_tiles: Write, extractor_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    normal = write_tiles("shots", range(2))
    base = ["export", "--extractor", str(extractor_dir), "--normal", str(normal), "--device", "cpu", "--out"]
    for more, message in (
        ([str(normal)], "is a folder; name the file to write"),
        ([str(normal / "tile_0.png")], "does not end in .onnx; name the file to write"),
        ([str(tmp_path / "m.onnx"), "--check", str(tmp_path / "none")], "no such folder"),
        ([str(tmp_path / "m.onnx"), "--opset", "9"], "opset 9 is not supported"),
        (["/dev/null/m.onnx"], "/dev/null"),
    ):
        assert main([*base, *more]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err
        assert captured.err.count("\n") == 1
    assert not (tmp_path / "m.onnx").exists()
