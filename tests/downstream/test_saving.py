"""Every detector: saved, loaded in a new process without training data, the same bits; strict about its folder.

One subprocess loads all of them and writes what they predict.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adpretrain.backbones import Backbone, FeatureMaps, load_backbone
from adpretrain.extractor import ADExtractor
from adpretrain.local_scale import LocalScale
from downstream.detectors import DETECTORS, detector_from_pretrained, find_detector
from downstream.detectors.aligned import AlignedFeatureNorm, AlignedFeatureNormConfig
from downstream.detectors.anomalydino import AnomalyDINO, AnomalyDINOConfig
from downstream.detectors.cflow import CFLOW, CFLOWConfig
from downstream.detectors.dinomaly import Dinomaly, DinomalyConfig
from downstream.detectors.featurenorm import FeatureNorm, FeatureNormConfig
from downstream.detectors.glass import GLASS, GLASSConfig
from downstream.detectors.musc import MuSc
from downstream.detectors.padim import ADPRETRAIN, PaDiM, PaDiMConfig
from downstream.detectors.patchcore import PatchCore, PatchCoreConfig
from downstream.detectors.rd4ad import RD4AD
from downstream.detectors.recontrast import ReContrast, ReContrastConfig
from downstream.detectors.spade import SPADE
from downstream.detectors.subspacead import SubspaceAD, SubspaceADConfig
from downstream.detectors.uniad import UniAD, UniADConfig
from downstream.embedding import EmbeddingConfig
from downstream.lessons import LearningConfig

SIZE = 96
SMALL_DISCRIMINATOR = GLASSConfig(hidden=16, climb_steps=1, training=LearningConfig(steps=3))
SMALL_TRANSFORMER = UniADConfig(
    grid=8, width=16, heads=2, layers=1, inner=16, dropout=0.0, training=LearningConfig(steps=3)
)
ROOT = Path(__file__).parents[2]


def photographs(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def backbone() -> Backbone:
    return load_backbone("lite0", image_size=SIZE)


def extractor(references: bool = True) -> ADExtractor:
    network = backbone()
    made = ADExtractor(network, local_scale=LocalScale(len(network.channels)))
    return made.set_references(photographs(2, 7)) if references else made


STEPS = LearningConfig(steps=2, batch_size=3)
MAKE: dict[str, Callable[[], Any]] = {
    "featurenorm": lambda: FeatureNorm(extractor(), FeatureNormConfig(image_size=SIZE)),
    "featurenorm-raw": lambda: FeatureNorm(
        backbone(), FeatureNormConfig(image_size=SIZE, norm="released", top=0.1, sigma=2.0)
    ),
    "aligned": lambda: AlignedFeatureNorm(
        extractor(references=False), AlignedFeatureNormConfig(image_size=SIZE, shots=2)
    ),
    "patchcore": lambda: PatchCore(backbone()),
    "patchcore-extractor": lambda: PatchCore(extractor(), PatchCoreConfig(amount=30, reweight=0)),
    "patchcore-half": lambda: PatchCore(extractor().bfloat16()),
    "patchcore-ivfpq": lambda: PatchCore(backbone(), PatchCoreConfig(method="none", search="ivfpq")),
    "patchcore-projected": lambda: PatchCore(
        backbone(), PatchCoreConfig(EmbeddingConfig(target_dim=20, reduction="project", seed=3))
    ),
    "padim": lambda: PaDiM(backbone()),
    "padim-levels": lambda: PaDiM(extractor(), ADPRETRAIN),
    "padim-cholesky": lambda: PaDiM(
        backbone(), PaDiMConfig(EmbeddingConfig(patch=1, target_dim=3, reduction="orthogonal"))
    ),
    "spade": lambda: SPADE(backbone()),
    "subspacead": lambda: SubspaceAD(backbone()),
    "subspacead-rotated": lambda: SubspaceAD(extractor(), SubspaceADConfig(variance=5, rotations=3, top=0.0)),
    "anomalydino": lambda: AnomalyDINO(backbone()),
    "anomalydino-masked": lambda: AnomalyDINO(backbone(), AnomalyDINOConfig(rotations=1, masking=0.5)),
    "musc": lambda: MuSc(backbone()),
    "rd4ad": lambda: RD4AD(backbone(), ReContrastConfig(form="A", training=STEPS)),
    "rd4ad-extractor": lambda: RD4AD(extractor(), ReContrastConfig(form="B", training=STEPS)),
    "recontrast": lambda: ReContrast(backbone(), ReContrastConfig(training=STEPS)),
    "recontrast-one": lambda: ReContrast(backbone(), ReContrastConfig(form="D", top=1.0, training=STEPS)),
    "dinomaly": lambda: Dinomaly(backbone(), DinomalyConfig([-1], training=STEPS)),
    "cflow": lambda: CFLOW(extractor(), CFLOWConfig(training=LearningConfig(steps=3))),
    "glass": lambda: GLASS(
        backbone(),
        dataclasses.replace(SMALL_DISCRIMINATOR, embedding=EmbeddingConfig(target_dim=20, reduction="project")),
    ),
    "uniad": lambda: UniAD(backbone(), SMALL_TRANSFORMER),
}

LOAD = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from downstream.detectors import detector_from_pretrained
torch.set_num_threads(1)
images = torch.load(sys.argv[2], weights_only=True)
out = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    found = detector_from_pretrained(folder).predict(images)
    out |= {f"{folder.name}.scores": found.scores, f"{folder.name}.maps": found.maps}
save_file({name: value.contiguous() for name, value in out.items()}, sys.argv[3])
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """The folders, what the detectors predicted when they were saved, and what they predict in a new process."""
    folder = tmp_path_factory.mktemp("detectors")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before: dict[str, Tensor] = {}
    for name, make in MAKE.items():
        detector = make().fit(photographs(5, 0).split(2))
        found = detector.predict(photographs(2, 1))
        detector.save_pretrained(folder / "saved" / name)
        before |= {f"{name}.scores": found.scores, f"{name}.maps": found.maps}
    torch.set_num_threads(threads)
    torch.save(photographs(2, 1), folder / "images.pt")
    arguments = [str(folder / name) for name in ("saved", "images.pt", "out.safetensors")]
    subprocess.run([sys.executable, "-c", LOAD, *arguments], check=True, cwd=ROOT, env={**os.environ})
    return folder / "saved", before, load_file(folder / "out.safetensors")


@pytest.mark.parametrize("name", MAKE)
def test_a_new_process_gives_the_same_bits(saved: tuple[Path, dict[str, Tensor], dict[str, Tensor]], name: str) -> None:
    if name == "patchcore-ivfpq":
        pytest.importorskip("faiss")
    _, before, after = saved
    for part in ("scores", "maps"):
        assert float(before[f"{name}.{part}"].abs().max()) > 0
        assert torch.equal(before[f"{name}.{part}"], after[f"{name}.{part}"])


def layouts(thing: Any, name: str = "") -> dict[str, tuple[Any, ...]]:
    """How every tensor inside a detector lies in memory: shape, strides, alignment."""
    if isinstance(thing, Tensor):
        return {name: (thing.shape, thing.stride(), thing.data_ptr() % 64)}
    if isinstance(thing, Mapping):
        inside = dict(thing)
    elif isinstance(thing, Sequence) and not isinstance(thing, str):
        inside = dict(enumerate(thing))
    else:
        inside = getattr(thing, "__dict__", {})
    found = [layouts(value, f"{name}.{key}") for key, value in inside.items() if key != "_given"]
    return {key: value for part in found for key, value in part.items()}


@pytest.mark.parametrize("name", MAKE)
def test_tensors_lie_in_memory_as_they_will_after_loading(name: str, tmp_path: Path) -> None:
    """Products of the same numbers, laid out otherwise, have other last bits: on some processors only."""
    if name == "patchcore-ivfpq":
        pytest.importorskip("faiss")
    fitted = MAKE[name]().fit(photographs(5, 0).split(2))
    loaded = detector_from_pretrained(fitted.save_pretrained(tmp_path / name))
    for detector in (fitted, loaded):  # some of what is used is made at the first use
        detector.predict(photographs(1, 1))
    assert layouts(fitted) == layouts(loaded)


@pytest.mark.parametrize("name", MAKE)
def test_no_pickle_no_backbone(saved: tuple[Path, dict[str, Tensor], dict[str, Tensor]], name: str) -> None:
    folder = saved[0] / name
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    extractors = {"extractor/config.json", "extractor/model.safetensors", "extractor/README.md"}
    config = json.loads((folder / "config.json").read_text())
    assert files == {"config.json", "model.safetensors", "README.md"} | (
        extractors if config["extract"] == "extractor" else set()
    )
    assert set(load_file(folder / "model.safetensors")) == set(config["tensors"])
    assert config["detector"] in DETECTORS


def copy_of(saved: tuple[Path, dict[str, Tensor], dict[str, Tensor]], name: str, target: Path) -> Path:
    return Path(shutil.copytree(saved[0] / name, target / name))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_is_read_strictly(saved: tuple[Path, dict[str, Tensor], dict[str, Tensor]], tmp_path: Path) -> None:
    folder = copy_of(saved, "patchcore", tmp_path)
    with pytest.raises(ValueError, match="holds a 'patchcore' detector, not 'padim'"):
        PaDiM.from_pretrained(folder)
    edit(folder, detector="patchcores")
    with pytest.raises(ValueError, match="detector 'patchcores' is unknown; choose one of featurenorm"):
        detector_from_pretrained(folder)
    edit(folder, detector="patchcore", format_version=99)
    with pytest.raises(ValueError, match=r"format version 99.*upgrade adpretrain"):
        PatchCore.from_pretrained(folder)
    config = json.loads((saved[0] / "patchcore" / "config.json").read_text())
    edit(folder, format_version=1, options={**config["options"], "neighbors": 3})
    with pytest.raises(ValueError, match=r"unknown key neighbors.*known keys: embedding, amount"):
        PatchCore.from_pretrained(folder)
    edit(folder, options={**config["options"], "keep": 7.0})
    with pytest.raises(ValueError, match=r"keep 7\.0 must be a share"):
        PatchCore.from_pretrained(folder)
    edit(folder, options=config["options"])
    # Copies: some versions map the file, which is written over here.
    weights = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    for changed, message in (
        ({"bank": weights["bank"][1:]}, "bank is .*, its config says"),
        ({"bank": weights["bank"] * torch.nan}, "bank holds NaN"),
        ({}, "lacks bank"),
        ({**weights, "more": torch.zeros(1)}, "unknown weights more"),
    ):
        save_file({name: value.contiguous() for name, value in changed.items()}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            PatchCore.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config.json: expected a folder written by a detector's"):
        PatchCore.from_pretrained(folder)


def test_other_weights_are_noticed(tmp_path: Path) -> None:
    """A network with random weights is saved by name only: what is loaded by that name answers otherwise."""
    torch.manual_seed(0)
    network = load_backbone("timm/resnet18", pretrained=False, image_size=64, levels=[2])
    images = photographs(2, 0)[:, :, :64, :64]
    folder = PatchCore(network).fit([images]).save_pretrained(tmp_path / "patchcore")
    again = PatchCore.from_pretrained(folder, extract=network)
    assert torch.equal(again.predict(images).maps, PatchCore(network).fit([images]).predict(images).maps)
    torch.manual_seed(1)
    other = load_backbone("timm/resnet18", pretrained=False, image_size=64, levels=[2])
    with pytest.raises(ValueError, match="was fitted on other features: level 0 of a fixed picture differs by"):
        PatchCore.from_pretrained(folder, extract=other)
    wider = load_backbone("timm/resnet18", pretrained=False, image_size=64, levels=[2, 3])
    with pytest.raises(ValueError, match="was fitted on features of 1 levels"):
        PatchCore.from_pretrained(folder, extract=wider)


@pytest.mark.parametrize("kind", [PatchCore, PaDiM])
def test_folders_of_earlier_versions(kind: Any, tmp_path: Path) -> None:
    """They name no `squared` or `align_corners`, and null levels of a residual network were all of them."""
    torch.manual_seed(0)
    network = load_backbone("timm/resnet18", pretrained=False, image_size=64)
    images = photographs(3, 0)[:, :, :64, :64]
    config = dataclasses.replace(kind(network).config, embedding=EmbeddingConfig(levels=None, target_dim=20))
    detector = kind(network, config).fit([images])
    folder = detector.save_pretrained(tmp_path / "old")
    options = json.loads((folder / "config.json").read_text())["options"]
    assert options["embedding"]["levels"] is None
    edit(folder, options={key: value for key, value in options.items() if key not in ("squared", "align_corners")})
    assert len(json.loads((folder / "config.json").read_text())["options"]) == len(options) - 1
    assert torch.equal(kind.from_pretrained(folder, network).predict(images).maps, detector.predict(images).maps)
    new = kind(network).fit([images]).save_pretrained(tmp_path / "new")
    stages = json.loads((new / "config.json").read_text())["options"]["embedding"]["levels"]
    assert stages == ([1, 2] if kind is PatchCore else [0, 1, 2])


def test_references_are_those_of_the_fit(
    saved: tuple[Path, dict[str, Tensor], dict[str, Tensor]], tmp_path: Path
) -> None:
    """An extractor given without references gets the saved ones; one with others is refused."""
    folder, before, _ = saved
    loaded = PatchCore.from_pretrained(folder / "patchcore-extractor", extract=extractor(references=False))
    maps = loaded.predict(photographs(2, 1)).maps
    # Of another network object: with several threads, where its weights lie in memory decides the last bits.
    torch.testing.assert_close(maps, before["patchcore-extractor.maps"], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="or other references set"):
        PatchCore.from_pretrained(
            folder / "patchcore-extractor", extract=extractor(False).set_references(photographs(2, 8) * 0.3)
        )
    per_image = extractor(False)
    per_image.set_references(per_image.encode_references(photographs(4, 0).unflatten(0, (2, 2))))
    detector = PatchCore(per_image).fit([photographs(2, 0)])
    with pytest.raises(ValueError, match="one set of references for all images, not 2"):
        detector.save_pretrained(tmp_path / "two")


def test_any_function_is_an_extract(tmp_path: Path) -> None:
    network = backbone()

    def mine(images: Tensor) -> FeatureMaps:
        return [level**2 for level in network(images)]

    detector = PatchCore(mine).fit([photographs(3, 0)])
    folder = detector.save_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match="pass the same one as extract="):
        PatchCore.from_pretrained(folder)
    again = PatchCore.from_pretrained(folder, extract=mine)
    assert torch.equal(again.predict(photographs(1, 1)).maps, detector.predict(photographs(1, 1)).maps)


def test_saving_twice_replaces_and_other_files_are_kept(tmp_path: Path) -> None:
    detector = PatchCore(extractor()).fit([photographs(3, 0)])
    for _ in range(2):
        detector.save_pretrained(tmp_path / "fitted")
    assert sorted(path.name for path in (tmp_path / "fitted").iterdir()) == [
        "README.md",
        "config.json",
        "extractor",
        "model.safetensors",
    ]
    (tmp_path / "fitted" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes.txt\).*over an earlier detector"):
        detector.save_pretrained(tmp_path / "fitted")
    assert (tmp_path / "fitted" / "notes.txt").exists()


@pytest.mark.parametrize("name", [name for name in MAKE if name != "featurenorm-raw"])
def test_mistakes_are_named(name: str, tmp_path: Path) -> None:
    make = MAKE[name]
    if name not in ("featurenorm",):  # its references are already set
        with pytest.raises(ValueError, match=r"call fit\(normal_batches\)"):
            make().predict(photographs(1, 0))
        with pytest.raises(ValueError, match=r"call fit\(normal_batches\)"):
            make().save_pretrained(tmp_path / "unfitted")
    for images, message in (
        (torch.rand(3, SIZE, SIZE), r"images must be \[B, 3, S, S\]"),
        (torch.rand(1, 1, SIZE, SIZE), r"images must be \[B, 3, S, S\]"),
        (torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), "images must be floating-point"),
        (torch.full((1, 3, SIZE, SIZE), torch.nan), "images hold NaN"),
        (torch.rand(1, 3, SIZE, SIZE + 32)[..., : SIZE + 32], r"images must be \[B, 3, S, S\]"),
    ):
        with pytest.raises(ValueError, match=message):
            make().fit([images])
    with pytest.raises(ValueError, match=r"no normal images|pool of 0 images"):
        make().fit([])
    detector = make().fit(photographs(5, 0).split(2))
    with pytest.raises(ValueError, match="images hold NaN"):
        detector.predict(torch.full((1, 3, SIZE, SIZE), torch.nan))
    with pytest.raises(ValueError, match=r"images must be \[B, 3, S, S\] with B > 0"):
        detector.predict(photographs(0, 0))


def test_the_table_names_every_class() -> None:
    for name, entry in DETECTORS.items():
        loaded = entry.load()
        assert callable(loaded.from_pretrained)
        assert callable(loaded.save_pretrained)
        assert entry.options() is not None
        assert find_detector(name) is entry
    with pytest.raises(ValueError, match="detector 'unet' is unknown; choose one of featurenorm"):
        find_detector("unet")
