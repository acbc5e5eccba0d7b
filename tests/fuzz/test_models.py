"""Saved models that somebody damaged: each is loaded, or refused in a sentence that names it, in bounded memory."""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bounded import bounded
from hypothesis import given
from hypothesis import strategies as st
from test_images import HOW, mutated

from adpretrain.backbones import load_backbone
from adpretrain.config import ProjectorConfig
from adpretrain.extractor import ADExtractor
from adpretrain.projector import FeatureProjector
from adpretrain.saved import folder_digest
from downstream.cli import main
from downstream.commands.info import describe_model
from downstream.detectors import detector_from_pretrained
from downstream.detectors.anomalydino import AnomalyDINO
from downstream.detectors.cflow import CFLOW, CFLOWConfig
from downstream.detectors.dinomaly import Dinomaly, DinomalyConfig
from downstream.detectors.ensemble import Ensemble
from downstream.detectors.featurenorm import FeatureNorm, FeatureNormConfig
from downstream.detectors.glass import GLASS, GLASSConfig
from downstream.detectors.musc import MuSc
from downstream.detectors.padim import PaDiM, PaDiMConfig
from downstream.detectors.patchcore import PatchCore, PatchCoreConfig
from downstream.detectors.reconpatch import ReConPatch, ReConPatchConfig
from downstream.detectors.reconpatch.representation import RepresentationConfig
from downstream.detectors.recontrast import ReContrast, ReContrastConfig
from downstream.detectors.spade import SPADE
from downstream.detectors.subspacead import SubspaceAD
from downstream.detectors.uniad import UniAD, UniADConfig
from downstream.embedding import EmbeddingConfig
from downstream.lessons import LearningConfig

SIDE = 64
BOUND = 400 << 10  # KiB of peak memory that refusing may take
JUNK: list[Any] = [
    None,
    -1,
    0,
    1,
    3,
    10**9,
    10**18,
    2**63,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    -1e308,
    "",
    "x" * 500,
]
JUNK += ["../../etc/passwd", "\0", "[[[[", True, False, [], [0], [-1], [10**9] * 4, [[[]]], {}, {"a": 1}, {"": None}]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An extractor with a projector, and fitted detectors, by name."""
    root = tmp_path_factory.mktemp("models")
    backbone = load_backbone("lite0", image_size=SIDE)
    config = ProjectorConfig(references=8, heads=2, mlp_ratio=1.0)
    extractor = ADExtractor(backbone, FeatureProjector(backbone.channels, config), provenance={"seed": 1})
    images = torch.rand(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    core = PatchCoreConfig(EmbeddingConfig(target_dim=8), amount=0.2)
    training = RepresentationConfig(dim=8, projection_dim=8, epochs=1)
    members: list[Any] = [
        PatchCore(backbone, core),
        PaDiM(backbone, PaDiMConfig(EmbeddingConfig(patch=1, target_dim=8))),
    ]
    for member in members:
        member.fit([images])
    made: dict[str, Any] = {
        "extractor": extractor,
        "featurenorm": FeatureNorm(extractor, FeatureNormConfig(image_size=SIDE)).fit([images[:2]]),
        "patchcore": members[0],
        "padim": members[1],
        "spade": SPADE(backbone).fit([images]),
        "subspacead": SubspaceAD(backbone).fit([images]),
        "anomalydino": AnomalyDINO(backbone).fit([images]),
        "musc": MuSc(backbone).fit([images]),
        "cflow": CFLOW(backbone, CFLOWConfig(blocks=2, training=LearningConfig(steps=1))).fit([images]),
        "glass": GLASS(backbone, GLASSConfig(hidden=8, climb_steps=1, training=LearningConfig(steps=1))).fit([images]),
        "uniad": UniAD(backbone, UniADConfig(width=16, layers=1, training=LearningConfig(steps=1))).fit([images]),
        "reconpatch": ReConPatch(backbone, ReConPatchConfig(core, training)).fit([images]),
        "recontrast": ReContrast(backbone, ReContrastConfig(training=LearningConfig(1))).fit([images]),
        "dinomaly": Dinomaly(backbone, DinomalyConfig([-1], training=LearningConfig(1))).fit([images]),
        "ensemble": Ensemble(members).fit([images]),
    }
    return {name: model.save_pretrained(root / name) for name, model in made.items()}


NAMES = [
    "extractor",
    "featurenorm",
    "patchcore",
    "padim",
    "spade",
    "subspacead",
    "anomalydino",
    "musc",
    "cflow",
    "glass",
    "uniad",
    "reconpatch",
    "recontrast",
    "dinomaly",
    "ensemble",
]


def load(folder: Path, name: str) -> None:
    """Everything that reads a saved model. Anything but a ValueError or OSError that names it fails the test."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (describe_model, use_extractor if name == "extractor" else use_detector):
        said = ""
        try:
            read(folder)
        except (ValueError, OSError) as error:
            said = str(error)
        assert not said or str(folder) in said or any(words in said for words in NAMED), said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < BOUND


# Sentences about a value that the config holds, which name the value and the valid ones instead.
NAMED = (
    "expected",
    "choose one of",
    "must be",
    "takes images of",
    "needs an image_size",
    "fitted on images",
    "unknown",
    "do not fit",
    "crop_from",
)


def use_extractor(folder: Path) -> None:
    extractor = ADExtractor.from_pretrained(folder)
    extractor.set_references(torch.rand(1, 3, SIDE, SIDE))(torch.rand(1, 3, SIDE, SIDE))


def use_detector(folder: Path) -> None:
    detector_from_pretrained(folder).predict(torch.rand(1, 3, SIDE, SIDE))


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to everything inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, part in inside for place in places(part, (*at, key)))]


def replaced(content: Any, at: tuple[Any, ...], value: Any) -> Any:
    content = copy.deepcopy(content)
    place = content
    for key in at[:-1]:
        place = place[key]
    if not at:
        return value
    place[at[-1]] = value
    return content


def damaged_copy(models: dict[str, Path], name: str, damage: Callable[[Path], None]) -> Path:
    target = models[name].parent / "damaged"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(models[name], target)
    damage(target)
    return target


@bounded(60)
@given(name=st.sampled_from(NAMES), at=st.integers(0, 10**6), value=st.sampled_from(JUNK))
def test_any_value_anywhere_in_a_config(models: dict[str, Path], name: str, at: int, value: Any) -> None:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        spots = places(content)
        (folder / "config.json").write_text(json.dumps(replaced(content, spots[at % len(spots)], value)))

    load(damaged_copy(models, name, damage), name)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@bounded(40)
@given(
    name=st.sampled_from(NAMES),
    entry=st.integers(0, 50),
    field=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=st.sampled_from(
        [
            "F64",
            "F16",
            "BF16",
            "I64",
            "I32",
            "U8",
            "BOOL",
            "F8_E4M3",
            "C64",
            "X",
            *JUNK,
            [0, 4],
            [4, 0],
            [0, 2**40],
            [1, 1, 1],
        ]
    ),
)
def test_a_header_that_lies(models: dict[str, Path], name: str, entry: int, field: str, value: Any) -> None:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        header, body = header_of(path)
        names = sorted(key for key in header if key != "__metadata__")
        if names:
            header[names[entry % len(names)]][field] = value
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)

    load(damaged_copy(models, name, damage), name)


@bounded(40)
@given(
    name=st.sampled_from(NAMES),
    file=st.sampled_from(["config.json", "model.safetensors"]),
    seed=st.integers(0, 10**6),
    how=HOW,
)
def test_damaged_bytes(models: dict[str, Path], name: str, file: str, seed: int, how: str) -> None:
    def damage(folder: Path) -> None:
        path = folder / file
        path.write_bytes(mutated(path.read_bytes(), seed, how))

    load(damaged_copy(models, name, damage), name)


def nan(folder: Path) -> None:
    path = folder / "model.safetensors"
    body = header_of(path)[1]
    numbers = np.frombuffer(body, np.float32).copy()
    numbers[len(numbers) // 2] = np.nan
    path.write_bytes(path.read_bytes()[: -len(body)] + numbers.tobytes())


def huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


def pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def pipe_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def endless(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


def deep(folder: Path) -> None:
    (folder / "config.json").write_text('{"provenance": ' + "[" * 5000 + "]" * 5000 + "}")


def deep_but_read(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    for _ in range(300):
        content["provenance"] = {"a": content.get("provenance", {})}
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("damage", [nan, huge_header, pipe, pipe_config, endless, deep, deep_but_read])
@pytest.mark.parametrize("name", ["extractor", "patchcore"])
def test_damage_of_a_kind(models: dict[str, Path], name: str, damage: Callable[[Path], None]) -> None:
    load(damaged_copy(models, name, damage), name)


@pytest.mark.parametrize("damage", [pipe, pipe_config])
def test_a_pipe_has_no_digest(models: dict[str, Path], damage: Callable[[Path], None]) -> None:
    assert len(folder_digest(models["extractor"])) == 64
    folder = damaged_copy(models, "extractor", damage)
    with pytest.raises(ValueError, match=f"{folder} has no file"):
        folder_digest(folder)


def test_members_that_are_links_are_refused(models: dict[str, Path]) -> None:
    """64 members, each of them the folder itself, would be loaded for ever."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        content["facts"]["members"] = 64
        (folder / "config.json").write_text(json.dumps(content))
        for number in range(64):
            shutil.rmtree(folder / f"member-{number}", ignore_errors=True)
            (folder / f"member-{number}").symlink_to(folder)

    folder = damaged_copy(models, "ensemble", damage)
    with pytest.raises(ValueError, match="is a link"):
        detector_from_pretrained(folder)
    assert main(["info", str(folder)]) == 2


@pytest.mark.parametrize(("option", "name"), [("extractor", "extractor"), ("detector", "patchcore")])
def test_one_line_and_exit_code_2(
    models: dict[str, Path], option: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for damage in (huge_header, pipe, pipe_config, deep, endless):
        folder = damaged_copy(models, name, damage)
        where = [f"--normal={tmp_path}", f"--images={tmp_path}", f"--out={tmp_path}/out", f"--{option}={folder}"]
        (tmp_path / "a.png").write_bytes(b"")
        assert main(["score", *where]) == 2
        said = capsys.readouterr().err
        assert said.startswith("adpretrain: error: ")
        assert said.count("\n") == 1
        assert str(folder) in said
    (tmp_path / "deep.yaml").write_text("normal: " + "[" * 300_000)
    assert main(["score", f"--config={tmp_path}/deep.yaml"]) == 2
    assert "32 collections" in capsys.readouterr().err
