"""Which cells a comparison has, and which process computes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adpretrain.backbones import load_backbone
from adpretrain.data import Sample
from adpretrain.extractor import ADExtractor
from downstream.evaluation.cells import Cell, cells_of, shares
from downstream.evaluation.comparison import Comparison, SetRow
from downstream.evaluation.networks import ALIGNED, Contender, Features, Networks
from downstream.evaluation.protocols import Part, Trial, trials


@pytest.fixture(scope="module")
def rows() -> list[Features]:
    """Raw features, and those of two extractors, seeds of one training."""
    backbone = load_backbone("lite0", image_size=64)
    extractor = ADExtractor(backbone)
    two = Networks(backbone, (extractor, extractor))
    return [
        Features("raw", "raw", Networks(backbone), {}, {}),
        Features("ours", "pretrained", two, {}, {"a": "digest a", "b": "digest b"}),
    ]


def files(folder: Path, name: str, train: int, test: int) -> list[Sample]:
    samples = []
    for index in range(train + test):
        file = folder / f"{name}{index}.png"
        file.write_bytes(b"")
        samples.append(Sample(file, None, name, "good", None, "train" if index < train else "test"))
    return samples


def test_cells_are_every_detector_on_every_kind_of_features(rows: list[Features], tmp_path: Path) -> None:
    found = trials(files(tmp_path, "cap", 4, 2), Comparison(draws=1))
    comparison = Comparison(detectors=["padim", "featurenorm", ALIGNED], draws=1)
    cells = cells_of(comparison, [(SetRow(name="set"), found)], rows)
    assert [cell.contender for cell in cells] == [
        *(Contender("padim", "raw"), Contender("featurenorm", "raw")),
        *(Contender("padim", "pretrained", 0), Contender("padim", "pretrained", 1)),
        *(Contender("featurenorm", "pretrained", 0), Contender("featurenorm", "pretrained", 1)),
        *(Contender(ALIGNED, "pretrained", 0), Contender(ALIGNED, "pretrained", 1)),
    ]
    assert len({cell.digest for cell in cells}) == 8


def test_what_trains_a_copy_of_the_backbone_gets_raw_features(rows: list[Features], tmp_path: Path) -> None:
    found = trials(files(tmp_path, "cap", 4, 2), Comparison(draws=1))
    comparison, planned = Comparison(detectors=["recontrast", "rd4ad"], draws=1), [(SetRow(name="set"), found)]
    chosen = [(cell.contender.detector, cell.contender.features) for cell in cells_of(comparison, planned, rows)]
    assert chosen == [("recontrast", "raw"), ("rd4ad", "raw"), *2 * [("rd4ad", "pretrained")]]
    with pytest.raises(ValueError, match="takes a raw Backbone"):
        cells_of(comparison, planned, rows[1:])


def test_what_uses_no_drawn_references_runs_once(rows: list[Features], tmp_path: Path) -> None:
    """Draws of the references change nothing for raw features, and nothing where every image chooses its own: equal
    repeats would be shown as a spread of 0."""
    samples, counts = files(tmp_path, "cap", 9, 3), {}
    contenders = [Contender("padim", "raw"), Contender("padim", "pretrained"), Contender(ALIGNED, "pretrained")]
    for protocol in ("reference-sensitivity", "few-shot"):
        comparison = Comparison(protocol=protocol, detectors=["padim", ALIGNED])  # type: ignore[arg-type]
        cells = cells_of(comparison, [(SetRow(name="set"), trials(samples, comparison))], rows)
        counts[protocol] = [sum(cell.contender == row for cell in cells) for row in contenders]
    assert counts == {"reference-sensitivity": [1, 3, 1], "few-shot": [3, 3, 3]}


def test_products_are_spread_by_their_size(rows: list[Features]) -> None:
    def trial(name: str, images: int) -> Trial:
        samples = tuple(Sample(Path(f"{name}{i}"), None, name, "good", None, "test") for i in range(images))
        return Trial(name, "full", 0, (Part(name, (), (), samples),))

    def cells(*given: Trial) -> list[Cell]:
        rest: Any = ("set", "{product}")
        return [
            Cell(*rest, each, row, Contender("padim", row.kind), (0,), {"of": [each.name, row.kind]})
            for each in given
            for row in rows
        ]

    found = cells(trial("small", 1), trial("large", 5), trial("middle", 3))
    first, second = shares(found, 2)
    assert [cell.trial.name for cell in first] == ["large"] * 2
    assert [cell.trial.name for cell in second] == ["middle"] * 2 + ["small"] * 2
    assert [len(share) for share in shares(cells(trial("all products", 9)), 2)] == [1, 1]
    assert replace(found[0], set_name="both", naming="{set}/{product}").label("cap") == "both/cap"
