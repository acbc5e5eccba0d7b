"""What `recipes/evaluate.py` says of mistakes, and that it notices data that changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from products import make_synthetic

from adpretrain.data import Junk
from downstream import cli

ROOT = Path(__file__).resolve().parents[2]


def evaluate(monkeypatch: pytest.MonkeyPatch, root: Path, *flags: str) -> int:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    from evaluate import main

    fixed = ["--root", str(root), "--dataset", "mvtec", "--image-size", "64", "--references", "1", "--device", "cpu"]
    return main([*fixed, "--embeddings", "0", "--pictures", "0", *flags])


def test_mistakes_are_named_and_leave_no_folder(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "flat.yaml").write_text("patchcore: 3\n")
    out = tmp_path / "out"
    for flags, message in (
        (["--detectors", "padim", "--categories", "bolt", "nutt"], "categories ['nutt'] match none of: bolt, nut"),
        (["--detectors", "padim", "--categories"], "match none of: bolt, nut"),
        (["--detectors", ""], "no detectors to compare; choose from featurenorm"),
        (["--detectors", "padim", "--options", str(tmp_path / "flat.yaml")], "patchcore is 3; expected its options"),
        (
            ["--detectors", "padim", "--protocol", "few-shot", "--shots", "100", "--weights", str(tmp_path / "none")],
            "K = 100 references: bolt (2), nut (2)",
        ),
    ):
        assert evaluate(monkeypatch, photographs, *flags, "--out", str(out)) == 2, flags
        assert message in " ".join(capsys.readouterr().err.split())
        assert not out.exists()


def test_the_few_shot_table_of_a_set_without_masks_has_image_metrics_and_dashes(
    photographs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for category in ("bolt", "nut"):
        shutil.rmtree(photographs / category / "ground_truth")
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    from evaluate import main

    assert main(["--root", str(photographs), "--shots", "1"]) == 0
    captured = capsys.readouterr()
    said = " ".join(captured.err.split())
    assert said.count("no pixel metrics, which need one for each") == 2
    assert "bolt: " in said
    rows = [line.split() for line in captured.out.splitlines() if "FeatureNorm" in line]
    assert len(rows) == 1
    assert rows[0][-2:] == ["–", "–"]
    assert 0 <= float(rows[0][-3]) <= 100


@pytest.mark.parametrize("detectors", [[], ["--detectors", "featurenorm", "--features", "pretrained"]])
def test_inverted_masks_and_junk_among_them_are_told_in_the_words_of_check_data(
    detectors: list[str],
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    truth = photographs / "nut" / "ground_truth" / "dent" / "3_mask.png"
    with Image.open(truth) as mask:
        mask.point(lambda value: 255 - value).save(truth)
    junk = photographs / "bolt" / "ground_truth" / "dent" / ".ipynb_checkpoints" / "3_mask-checkpoint.png"
    junk.parent.mkdir()
    shutil.copy(truth, junk)
    out = ["--out", str(tmp_path / "out")] if detectors else []
    with pytest.warns(Junk, match=f"1 hidden or foreign files among the masks are ignored, such as {junk}"):
        assert evaluate(monkeypatch, photographs, "--shots", "1", *detectors, *out) == 0
    table = (tmp_path / "out" / "table.md").read_text() if detectors else capsys.readouterr().err
    share = 1 - 16 * 16 / 64**2
    assert f"nut: mask {truth} marks {share:.0%} of the pixels as defective: is it inverted?" in " ".join(table.split())
    assert "bolt: mask" not in table


def test_a_board_is_a_whole_evaluation(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe and the command give one table, from folders relative to the file."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    from evaluate import main

    extractor = "raw: {backbone: lite0, image_size: 64}"
    text = f"sets: [{{name: parts, root: set}}]\nextractors: {{{extractor}}}\ndetectors: [featurenorm]\nshots: [1]\n"
    (tmp_path / "board.yaml").write_text(text)
    flags = ["--board", str(tmp_path / "board.yaml"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(flags) == 0
    assert "| parts | K=1 | featurenorm | raw | 3 |" in capsys.readouterr().out
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "cells").iterdir()}
    assert cli.main(["evaluate", *flags[1:]]) == 0
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "cells").iterdir()} == written
    for more, message in (
        (
            ["--shots", "1", "--protocol", "full"],
            "sets, extractors and detectors itself: leave --shots, --protocol",
        ),
        ([], "needed: --root, the folder of a data set, or --board"),
    ):
        with pytest.raises(SystemExit):
            main([*flags, *more] if more else [])
        assert message in " ".join(capsys.readouterr().err.split())


def test_the_few_shot_table_names_the_product_with_too_few_images_before_it_computes_anything(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the last product; asked for before the extractor, which is not there."""
    (photographs / "nut" / "train" / "good" / "1.png").unlink()
    assert evaluate(monkeypatch, photographs, "--extractors", str(tmp_path / "absent"), "--shots", "1", "2") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "too few normal images for K = 2 references: nut (1); choose smaller numbers" in said


def test_help_shows_what_is_done_by_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    monkeypatch.setenv("COLUMNS", "200")
    import evaluate as recipe
    import plan

    for main, shown in (
        (recipe.main, ["pixels, without --extractors (default: 224)", "each process (default: 0)"]),
        (plan.main, ["trained on (default: 64)", "of the set (Real-IAD) (default: 151050)"]),
    ):
        with pytest.raises(SystemExit):
            main(["--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert all(words in said for words in shown), said
        assert "default: None" not in said
        assert "default: False" not in said


def test_weights_that_changed_under_their_name_are_refused(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "resnet18.pth"
    flags = [
        "--detectors",
        "featurenorm",
        "--categories",
        "bolt",
        "--backbone",
        "timm/resnet18.a1_in1k",
        "--weights",
        str(file),
    ]
    for seed, expected in ((0, 0), (0, 0), (1, 2)):
        torch.manual_seed(seed)
        torch.save(timm.create_model("resnet18").state_dict(), file)
        assert evaluate(monkeypatch, photographs, *flags, "--out", str(tmp_path / "out")) == expected
    assert "results of another configuration (fingerprint differ" in " ".join(capsys.readouterr().err.split())


def test_the_sets_own_split_is_asked_for_by_name(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--detectors", "featurenorm", "--out", str(tmp_path / "out")]
    assert evaluate(monkeypatch, photographs, *out, "--split", "1cls") == 2
    assert "listings to choose from exist for realiad" in " ".join(capsys.readouterr().err.split())
    root = make_synthetic(tmp_path / "own", 1, 4, 2, size=64, workers=1, progress=False)
    flags = ["--dataset", "realiad", "--split", "realiad_jsons", *out]
    assert evaluate(monkeypatch, root, *flags) == 0
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert (table["configuration"]["split"], table["records"][0]["trained_on"]) == ("realiad_jsons", 2)
    assert not table["records"][0]["notes"]


def test_results_of_images_that_changed_under_their_names_are_refused(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--detectors", "featurenorm", "--categories", "bolt", "--out", str(tmp_path / "out")]
    assert evaluate(monkeypatch, photographs, *flags) == 0
    assert evaluate(monkeypatch, photographs, *flags) == 0
    capsys.readouterr()
    Image.effect_noise((64, 64), 50).convert("RGB").save(photographs / "bolt" / "test" / "dent" / "3.png")
    assert evaluate(monkeypatch, photographs, *flags) == 2
    assert "holds results of another configuration (samples differ" in " ".join(capsys.readouterr().err.split())


def test_a_damaged_result_is_named(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--detectors", "featurenorm", "--categories", "bolt", "--out", str(tmp_path / "out")]
    assert evaluate(monkeypatch, photographs, *flags) == 0
    (cell,) = (tmp_path / "out" / "cells").rglob("*.json")
    cell.write_text("[")
    capsys.readouterr()
    assert evaluate(monkeypatch, photographs, *flags) == 2
    assert "is damaged" in (message := " ".join(capsys.readouterr().err.split()))
    assert "delete it, and it is computed again" in message
    cell.unlink()
    assert evaluate(monkeypatch, photographs, *flags) == 0
