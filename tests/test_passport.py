"""The licence passport: the chain of every backbone, of the embedded extractor, and of data of all kinds."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from adpretrain.backbones import BACKBONES
from adpretrain.config import BackboneConfig, DataConfig, PretrainConfig, ProjectorConfig
from adpretrain.data import DATASETS
from adpretrain.hub.download import EMBEDDED_FOLDER
from adpretrain.licences import (
    DATA_SETS,
    LICENCES,
    OWN,
    UNKNOWN,
    find_data_set,
    find_licence,
    strictest,
)
from adpretrain.passport import (
    CODE,
    DATA,
    PROJECTOR,
    deciding,
    in_a_product,
    in_words,
    passport,
    passport_of,
    trained_on,
)
from adpretrain.preprocess import Preprocess
from adpretrain.saved import ExtractorConfig, read_config
from adpretrain.training.run import layout_in
from downstream.cli import main
from downstream.commands.info import describe_model

MINE = {"set": "parts", "licence": "own"}


def config_of(backbone: str = "lite0", licence: str | None = None, **provenance: Any) -> ExtractorConfig:
    projector = ProjectorConfig()
    return ExtractorConfig(
        BackboneConfig(backbone), [8], Preprocess(64), projector, licence=licence, provenance=provenance
    )


def data_of(**data: Any) -> tuple[str, str, str]:
    """Name, licence and answer of the pretraining data."""
    (link,) = [link for link in passport(config_of(data=data)) if link.what == DATA]
    return link.name, link.licence, link.product


@pytest.mark.parametrize("name", BACKBONES)
def test_the_chain_of_every_backbone_is_as_strict_as_its_weights(name: str) -> None:
    """With data of one's own and our code, which allow everything, only the weights can decide."""
    links = passport(config_of(name, data=MINE))
    assert [link.what for link in links] == ["backbone weights", "pretraining data", "code"]
    assert (links[0].name, links[0].licence) == (name, BACKBONES[name].licence)
    assert in_a_product(links) == LICENCES[BACKBONES[name].licence].product
    assert links[0].source.startswith("https://")
    assert in_a_product(passport(config_of(name, data={"set": "Real-IAD"}))) == "no"


def test_the_strictest_link_decides_for_all() -> None:
    """The whole table of pairs, as the definition says: no, then unknown, then with conditions, then yes."""
    order = ["no", "unknown", "with conditions", "yes"]
    for first in order:
        for second in order:
            answer = order[min(order.index(first), order.index(second))]
            assert strictest([first, second]) == answer  # type: ignore[list-item]


def test_the_embedded_extractor_may_go_into_a_product(capsys: pytest.CaptureFixture[str]) -> None:
    links = passport(read_config(EMBEDDED_FOLDER))
    assert [(link.name, link.licence) for link in links] == [
        ("lite0", "Apache-2.0"),
        ("drawn products", "Apache-2.0"),
        ("adpretrain", "Apache-2.0"),
    ]
    assert in_a_product(links) == "yes"
    assert main(["info", "embedded"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"\nin a product +yes\n", told)
    assert "pretraining data drawn products: Apache-2.0, in a product: yes; https://www.apache.org/" in told
    assert "not by lawyers" in told
    assert main(["info", "embedded", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["in a product"], len(facts["licences"])) == ("yes", 3)
    assert facts["licences"][2]["what"] == CODE


def test_imagebind_and_real_iad_each_forbid_it() -> None:
    links = passport(config_of("imagebind", data=MINE))
    assert (in_a_product(links), [link.name for link in deciding(links)]) == ("no", ["imagebind"])
    links = passport(config_of("dinov2-base", data={"name": "realiad", "set": "Real-IAD"}))
    assert (in_a_product(links), [link.name for link in deciding(links)]) == ("no", ["Real-IAD"])
    assert in_words(links) == "A product may not use it, because of pretraining data Real-IAD (CC-BY-NC-SA-4.0)."
    links = passport(config_of("imagebind", data={"set": "realiad_1024"}))
    assert [link.name for link in deciding(links)] == ["imagebind", "Real-IAD"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Real-IAD", "Real-IAD"),
        ("realiad_512", "Real-IAD"),
        ("hf://Real-IAD/Real-IAD@main", "Real-IAD"),
        ("realiadvariety_raw", "Real-IAD Variety"),
        ("Real-IAD_Variety", "Real-IAD Variety"),
        ("mvtec_anomaly_detection", "MVTec AD"),
        ("mvtec_bottle", "MVTec AD"),
        ("MVTec-AD", "MVTec AD"),
        ("hf://Voxel51/mvtec-ad", "MVTec AD"),
        ("mvtec_ad_2", "MVTec AD 2"),
        ("mvtec_loco_anomaly_detection", "MVTec LOCO AD"),
        ("mvtec_3d_anomaly_detection", "MVTec 3D-AD"),
        ("VisA_20220922", "VisA"),
        ("visa", "VisA"),
        ("KolektorSDD", "KolektorSDD"),
        ("KolektorSDD2", "KolektorSDD2"),
        ("Magnetic-tile-defect-datasets", "Magnetic Tile Defects"),
        ("MTD", "Magnetic Tile Defects"),
        ("BTech_Dataset_transformed", "BTAD"),
        ("elpv", "ELPV"),
        ("dagm2007", "DAGM 2007"),
        ("40 drawn products, for the scale of a single reference only", "drawn products"),
        # Not these: what allows products must be named exactly, and what forbids them as a word of its own.
        ("our drawn products", None),
        ("visa-cards", None),
        ("smtdata", None),
        ("parts", None),
        ("", None),
    ],
)
def test_data_sets_are_found_by_the_names_of_their_folders(name: str, expected: str | None) -> None:
    assert find_data_set(name) == expected


def test_data_by_its_name_then_by_what_is_said_then_by_its_layout() -> None:
    assert data_of(set="photos", layout="realiad") == ("Real-IAD", "CC-BY-NC-SA-4.0", "no")
    assert data_of(set="photos", name="realiad") == ("Real-IAD", "CC-BY-NC-SA-4.0", "no")  # as saved before
    assert data_of(set="photos", layout="realiad", licence="Apache-2.0") == ("photos", "Apache-2.0", "yes")
    assert data_of(set="Real-IAD", licence="own") == ("Real-IAD", "CC-BY-NC-SA-4.0", "no")  # whoever says otherwise
    assert data_of(set="mvtec-layout") == ("MVTec AD", "CC-BY-NC-SA-4.0", "no")
    assert data_of(set="mvtec-layout", licence="own") == ("mvtec-layout", "own", "yes")
    assert data_of(set="mvtec_anomaly_detection", licence="own")[2] == "no"
    assert data_of(set="MPDD", licence="CC-BY-4.0") == ("MPDD", "CC-BY-4.0", "yes")  # whoever could read it
    assert data_of(set="synthetic", name="realiad", layout="drawn") == ("drawn products", "Apache-2.0", "yes")
    assert data_of(set="VisA") == ("VisA", "CC-BY-4.0", "yes")
    assert data_of(set="parts", layout="mvtec") == ("parts", "unknown", "unknown")  # the layout of own data, too
    assert data_of(set="parts", licence="own") == ("parts", "own", "yes")
    assert data_of(set="parts", licence="our contract of 2026") == ("parts", "our contract of 2026", "unknown")
    for strange in ({}, {"set": None}, {"set": 3, "licence": ["own"]}):
        assert data_of(**strange)[2] == "unknown"
    assert passport(config_of())[1].name == "not recorded"
    assert passport(config_of(data="many"))[1].product == "unknown"


def test_what_was_not_trained_has_no_data_and_a_converted_checkpoint_a_link_more() -> None:
    plain = dataclasses.replace(config_of(), projector=None)
    assert [link.what for link in passport(plain)] == ["backbone weights", "code"]
    assert trained_on(plain) == "lite0 without a projector: nothing in it was trained on defects"
    converted = passport(config_of("dinov2-base", converted_from={"file": "x.pth"}, data={"set": "Real-IAD"}))
    assert [(link.what, link.product) for link in converted[1:3]] == [(PROJECTOR, "unknown"), (DATA, "no")]
    told = trained_on(config_of(data={"set": "parts", "images": 9, "categories": 3}))
    assert told == "a projector on lite0, trained on parts, 9 images, 3 products"


def test_a_network_that_the_table_does_not_know_is_under_the_licence_that_its_config_says() -> None:
    unknown = passport(config_of("timm/resnet18.a1_in1k", UNKNOWN, data=MINE))[0]
    assert (unknown.licence, unknown.product) == ("unknown", "unknown")
    assert unknown.source == "https://huggingface.co/timm/resnet18.a1_in1k"
    assert passport(config_of("timm/resnet18.a1_in1k", "mit", data=MINE))[0].product == "yes"
    assert passport(config_of("made-here", None, data=MINE))[0].product == "unknown"
    assert passport(config_of("imagebind", "MIT", data=MINE))[0].product == "no"  # the table is surer


def test_the_tables_hold_together() -> None:
    layouts = [found.layout for found in DATA_SETS.values() if found.layout]
    assert len(layouts) == len(set(layouts))
    assert set(layouts) <= DATASETS.keys() | {"drawn"}
    for name, found in DATA_SETS.items():
        assert found.source.startswith(("https://", "http://"))
        assert found.licence is None or found.licence in LICENCES
        assert find_data_set(name) == name  # each is found by its own name
    assert find_licence("apache-2.0") == "Apache-2.0"
    assert find_licence("dinov3-license") == "DINOv3 License"
    assert find_licence("gpl-3.0") is None


def test_the_documentation_says_what_the_table_says() -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.splitlines() if line.startswith("|") and line.count("|") == 3]
    told = {name.strip(): row[2].split(":")[0].strip() for row in rows for name in row[1].split(",")}
    assert {name: told.get(name) for name in DATA_SETS} == {
        name: found.licence or "unknown" for name, found in DATA_SETS.items()
    }


def test_the_licence_of_own_photographs_is_one_of_the_table(tmp_path: Path) -> None:
    assert PretrainConfig(data=DataConfig(licence=OWN)).data.licence == OWN
    with pytest.raises(ValueError, match=r"data\.licence 'mine' is not a licence .*; choose one of Apache-2\.0, .*own"):
        DataConfig(licence="mine")
    with pytest.raises(ValueError, match=r"or leave it out: then it counts as unknown"):
        DataConfig(licence=UNKNOWN)
    (tmp_path / "parts" / "nut" / "train" / "good").mkdir(parents=True)
    assert layout_in(DataConfig("auto", str(tmp_path / "parts"))) == "mvtec"
    assert layout_in(DataConfig("auto", "hf://org/name")) == "hf"
    assert layout_in(DataConfig("auto", str(tmp_path / "gone"))) is None
    assert layout_in(DataConfig("visa", str(tmp_path))) == "visa"


def test_a_detector_has_the_passport_of_everything_in_it(tmp_path: Path) -> None:
    for part, content in {
        ".": {"detector": "patchcore", "backbone": {"name": "imagebind"}},
        "member-0": {"detector": "padim", "backbone": None},
    }.items():
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / "config.json").write_text(json.dumps(content))
    inside = tmp_path / "member-0" / "extractor"
    inside.mkdir()
    for name in ("config.json", "model.safetensors"):
        (inside / name).write_bytes((EMBEDDED_FOLDER / name).read_bytes())
    links = passport_of(tmp_path)
    assert [link.name for link in links] == ["imagebind", "lite0", "drawn products", "adpretrain"]
    assert in_a_product(links) == "no"
    (tmp_path / "config.json").write_text(json.dumps({"detector": "padim", "backbone": None, "extract": "given"}))
    assert (passport_of(tmp_path)[0].name, in_a_product(passport_of(tmp_path))) == ("a user's own function", "unknown")
    assert describe_model(inside)["in a product"] == "yes"
