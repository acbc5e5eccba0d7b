"""`recipes/evaluate.py`: killed and started again, on two processes, and with another configuration."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from hub_server.server import Hub
from processes import output, start, wait
from products import make_synthetic
from running import until

from adpretrain.backbones import load_backbone
from adpretrain.extractor import ADExtractor
from adpretrain.hub.download import EMBEDDED_FOLDER
from adpretrain.local_scale import LocalScale
from adpretrain.saved import folder_digest
from downstream.evaluation.perturbations import SETTINGS
from downstream.evaluation.protocols import PLAIN

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of three tiny products and an extractor without a projector."""
    folder = tmp_path_factory.mktemp("given")
    make_synthetic(folder / "set", 3, 5, 3, size=64, seed=4, workers=1, progress=False)
    ADExtractor(load_backbone("lite0", image_size=64)).save_pretrained(folder / "extractor")
    flags = [
        "--root",
        str(folder / "set"),
        "--extractors",
        str(folder / "extractor"),
        "--detectors",
        "featurenorm,padim",
    ]
    return [*flags, "--protocol", "full", "--references", "2", "--pictures", "1"]


def evaluate(*flags: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The command in this process: starting Python again takes longer than the evaluation."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    from evaluate import main

    return main([*flags, "--device", "cpu"])


def alone(rank: int, argv: list[str]) -> int:
    """The command in a process of its own, or of several, without a GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from evaluate import main

    return main(argv)


def table(folder: Path) -> list[dict[str, object]]:
    return json.loads((folder / "table.json").read_text())["records"]


@pytest.fixture(scope="module")
def uninterrupted(given: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert evaluate(*given, "--out", str(out), monkeypatch=monkeypatch) == 0
    return out


@pytest.mark.slow
def test_one_run_gives_all_files_and_every_contender(uninterrupted: Path) -> None:
    found = table(uninterrupted)
    assert len(found) == 3 * 2 * 2
    command = json.loads((uninterrupted / "table.json").read_text())["configuration"]["command"]
    assert command.startswith("accelerate launch recipes/evaluate.py --root")
    assert command.endswith("--device cpu")
    assert {(record["detector"], record["features"]) for record in found} == {
        (detector, features) for detector in ("featurenorm", "padim") for features in ("raw", "pretrained")
    }
    assert all(0 <= record["metrics"]["aupro"] <= 1 for record in found)  # type: ignore[index]
    for name in ("table.csv", "table.md", "table.tex", "report.html", "means.md"):
        assert (uninterrupted / name).stat().st_size > 200


@pytest.mark.slow
def test_killed_and_started_again_it_computes_nothing_twice(
    given: list[str], uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    (process,) = start(1, log, alone, [*given, "--out", str(out), "--device", "cpu"])
    assert until(lambda: len(list((out / "cells").glob("*.json"))) >= 2, process.is_alive)
    process.kill()
    wait([process], log, expected=-signal.SIGKILL)
    finished = sorted((out / "cells").glob("*.json"))
    assert 2 <= len(finished) < 12
    written = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in finished}
    assert evaluate(*given, "--out", str(out), monkeypatch=monkeypatch) == 0
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in finished} == written
    assert table(out) == table(uninterrupted)
    assert (out / "table.md").read_bytes() == (uninterrupted / "table.md").read_bytes()


@pytest.mark.slow
def test_two_processes_share_the_products_and_give_the_table_of_one(
    given: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    wait(start(2, log, alone, [*given, "--out", str(out), "--device", "cpu"]), log)
    for rank in (0, 1):
        assert f"process {rank + 1} of 2" in output(log, rank)
    assert table(out) == table(uninterrupted)


@pytest.mark.slow
def test_another_configuration_adds_cells_and_leaves_the_finished_ones(
    given: list[str], uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    before = {path: path.read_bytes() for path in (out / "cells").iterdir()}
    flags = [*given, "--detectors", "featurenorm", "--out", str(out)]
    assert evaluate(*flags, "--protocol", "sample-efficiency", monkeypatch=monkeypatch) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert len(list((out / "cells").iterdir())) == len(before) + 3 * 2
    assert {record["setting"] for record in table(out)} == {"10 % of the training images"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protocol", "settings", "records"),
    [
        ("few-shot", {"K=1", "K=2"}, 2 * 3 * 2 * 3),
        ("sample-efficiency", {"50 % of the training images"}, 3 * 2),
        ("contamination", {"K=2, noise 0.5, in the references too, overlap"}, 3 * 2 * 3),
        ("reference-sensitivity", {"reference-sensitivity"}, 3 * (1 + 3)),
        ("multi-class", {"multi-class"}, 3 * 2),
        ("robustness", {f"K=2, {name}" for name in (*SETTINGS, PLAIN)}, 8 * 3 * 2 * 3),
        ("shifted-line", {"K=1, shifted-line", "K=2, shifted-line"}, 2 * 3 * 2 * 3),
    ],
)
def test_every_protocol_runs(
    protocol: str, settings: set[str], records: int, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*given, "--protocol", protocol, "--out", str(tmp_path / "out"), "--share", "0.5"]
    flags += ["--shots", "2"] if protocol in ("contamination", "robustness") else ["--shots", "1", "2"]
    flags += ["--noise", "0.5", "--detectors", "featurenorm", "--pictures", "0", "--references", "1"]
    assert evaluate(*flags, monkeypatch=monkeypatch) == 0
    found = table(tmp_path / "out")
    assert {record["setting"] for record in found} == settings
    assert len(found) == records


@pytest.mark.slow
def test_random_weights_are_those_of_the_seed(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--root", given[1], "--protocol", "full", "--products", "p000*"]
    flags += ["--backbone", "timm/resnet10t.c3_in1k", "--image-size", "64", "--levels", "2", "3", "--references", "1"]
    scores = []
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert evaluate(*flags, "--random-weights", seed, "--out", str(tmp_path / out), monkeypatch=monkeypatch) == 0
        scores.append([record["metrics"]["pixel_auroc"] for record in table(tmp_path / out)])  # type: ignore[index]
    assert scores[0] == scores[1] != scores[2]


def test_an_extractor_of_the_hub_gives_the_numbers_of_its_folder(
    hub: Hub, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ADExtractor.from_pretrained(given[3]).push_to_hub("factory/mine", tag="v1")
    quick = ["--products", "p000*", "--features", "pretrained", *given[4:], "--detectors", "featurenorm"]
    for name, out in ((given[3], "folder"), ("factory/mine@v1", "hub")):
        flags = [*given[:3], name, *quick, "--out", str(tmp_path / out)]
        assert evaluate(*flags, monkeypatch=monkeypatch) == 0
    assert table(tmp_path / "hub") == table(tmp_path / "folder")
    found = json.loads((tmp_path / "hub" / "table.json").read_text())["configuration"]["extractors"]
    assert found == [{"folder": "factory/mine@v1", "sha256": folder_digest(Path(given[3]))}]


def test_without_an_extractor_it_is_the_embedded_one(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*given[:2], "--products", "p000*", "--shots", "2", "--draws", "1", "--pictures", "0"]
    flags += ["--detectors", "featurenorm", "--out", str(tmp_path / "out")]
    assert evaluate(*flags, "--features", "raw,pretrained", monkeypatch=monkeypatch) == 0
    assert [record["features"] for record in table(tmp_path / "out")] == ["raw", "pretrained"]
    found = json.loads((tmp_path / "out" / "table.json").read_text())["configuration"]["extractors"]
    assert found == [{"folder": "embedded", "sha256": folder_digest(EMBEDDED_FOLDER)}]


def test_the_backbones_weights_reach_the_extractors(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [*given[:4], "--shots", "1"]
    for flags in (few, [*given, "--out", str(tmp_path / "out")]):
        assert evaluate(*flags, "--weights", "backbone.pth", monkeypatch=monkeypatch) == 2
        assert "weights file backbone.pth does not exist" in " ".join(capsys.readouterr().err.split())


def test_flags_that_do_not_belong_together_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, message in (
        (["--random-weights", "0", "--weights", "a.pth"], "random_weights 0 and weights a.pth: give one of the two"),
        (["--extractors", "embedded", "--levels", "2"], "levels cannot be given with an extractor"),
        (["--backbone", "lite0", "--features", "scaled", "--extractors", "embedded"], "name one of the two"),
        (["--features", "cooked"], "expected one of raw, residual, scaled, pretrained"),
        (["--detecters", "padim"], "unknown option --detecters (did you mean --detectors?)"),
    ):
        assert evaluate("--root", "nowhere", *flags, monkeypatch=monkeypatch) == 2
        assert message in " ".join(capsys.readouterr().err.split()), flags
    assert evaluate("--root", "nowhere", monkeypatch=monkeypatch) == 2
    assert "nowhere" in capsys.readouterr().err


def test_every_kind_of_features_is_compared_on_the_same_references(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = load_backbone("lite0", image_size=64)
    ADExtractor(backbone, local_scale=LocalScale(len(backbone.channels))).save_pretrained(tmp_path / "scaled")
    flags = [*given[:2], "--extractors", str(tmp_path / "scaled"), "--shots", "1", "2", "--products", "p000*"]
    flags += ["--features", "raw", "residual", "scaled", "pretrained", "--out", str(tmp_path / "out")]
    assert evaluate(*flags, monkeypatch=monkeypatch) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "featurenorm" in line]
    assert len(rows) == 2 * 4
    # Without a projector the extractor is its own baseline.
    scaled, pretrained = ([row[-4:] for row in rows if row[4].strip() == name] for name in ("scaled", "pretrained"))
    assert scaled == pretrained
