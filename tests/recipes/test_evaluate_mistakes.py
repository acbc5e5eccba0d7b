"""What `recipes/evaluate.py` says of mistakes, and that it notices data that changed."""

from __future__ import annotations

import contextlib
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

    fixed = ["--root", str(root), "--dataset", "mvtec", "--protocol", "full", "--references", "1", "--device", "cpu"]
    size = [] if "--extractors" in flags or "--features" in flags else ["--image-size", "64"]
    return main([*fixed, "--pictures", "0", *size, *flags])


def test_mistakes_are_named_and_leave_no_folder(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "flat.yaml").write_text("detectors: [patchcore: 3]\n")
    out = tmp_path / "out"
    for flags, message in (
        (["--products", "bolt", "nutt"], "products ['nutt'] are not in"),
        (["--defects", "dant"], "defects ['dant'] are unknown; this set has: dent"),
        (["--detectors", ""], "detectors must not be empty"),
        (["--config", str(tmp_path / "flat.yaml")], "flat.yaml: detectors[0] is {'patchcore': 3}; expected a detector"),
        (
            ["--protocol", "few-shot", "--shots", "100", "--weights", str(tmp_path / "none")],
            "K = 100 references: bolt (2), nut (2)",
        ),
    ):
        assert evaluate(monkeypatch, photographs, *flags, "--out", str(out)) == 2, flags
        assert message in " ".join(capsys.readouterr().err.split())
        assert not out.exists()


def test_a_set_without_masks_has_image_metrics_and_dashes(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for category in ("bolt", "nut"):
        shutil.rmtree(photographs / category / "ground_truth")
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    from evaluate import main

    flags = ["--shots", "1", "--draws", "1", "--features", "pretrained", "--device", "cpu"]
    assert main(["--root", str(photographs), *flags, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "- bolt, nut: 1 defects have no mask, such as 3.png: no pixel metrics, which need one for each" in said
    (row,) = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if "featurenorm" in line]
    assert row[-2:] == ["–", "–"]
    assert 0 <= float(row[-3]) <= 100


def test_inverted_masks_and_junk_among_them_are_told_in_the_words_of_check_data(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = photographs / "nut" / "ground_truth" / "dent" / "3_mask.png"
    with Image.open(truth) as mask:
        mask.point(lambda value: 255 - value).save(truth)
    junk = photographs / "bolt" / "ground_truth" / "dent" / ".ipynb_checkpoints" / "3_mask-checkpoint.png"
    junk.parent.mkdir()
    shutil.copy(truth, junk)
    with pytest.warns(Junk, match=f"1 hidden or foreign files among the masks are ignored, such as {junk}"):
        assert evaluate(monkeypatch, photographs, "--out", str(tmp_path / "out")) == 0
    table = (tmp_path / "out" / "table.md").read_text()
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
    (tmp_path / "comparison.yaml").write_text(text)
    flags = ["--config", str(tmp_path / "comparison.yaml"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(flags) == 0
    assert "| parts | K=1 | featurenorm | raw | 3 |" in capsys.readouterr().out
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "cells").iterdir()}
    assert cli.main(["evaluate", *flags[1:]]) == 0
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "cells").iterdir()} == written
    capsys.readouterr()
    assert main([*flags, "--draws", "1", "--detectors", "padim"]) == 0  # flags replace the file's keys
    assert "| parts | K=1 | padim | raw | 1 |" in capsys.readouterr().out
    assert main(["--device", "cpu"]) == 2
    assert "needed: --root, the folder of a data set, or a file with sets" in " ".join(capsys.readouterr().err.split())


def test_the_product_with_too_few_images_is_named_before_anything_is_computed(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the last product; asked for before the extractor, which is not there."""
    (photographs / "nut" / "train" / "good" / "1.png").unlink()
    flags = ["--extractors", str(tmp_path / "absent"), "--protocol", "few-shot", "--shots", "1", "2"]
    assert evaluate(monkeypatch, photographs, *flags) == 2
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
        (recipe.main, ["each further draw adds 1 (default: 0)", "(default: few-shot)"]),
        (plan.main, ["(type: int, default: 64)", "(type: int, default: 151050)"]),
    ):
        with contextlib.suppress(SystemExit):
            main(["--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert all(words in said for words in shown), said
        assert "default: None" not in said
        assert "default: False" not in said


def cells(out: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in (out / "cells").iterdir()}


def test_weights_that_changed_under_their_name_are_other_weights(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, counts = tmp_path / "resnet18.pth", []
    flags = ["--products", "bolt", "--backbone", "timm/resnet18.a1_in1k", "--weights", str(file)]
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        torch.save(timm.create_model("resnet18").state_dict(), file)
        assert evaluate(monkeypatch, photographs, *flags, "--out", str(tmp_path / "out")) == 0
        counts.append(len(cells(tmp_path / "out")))
    assert counts == [1, 1, 2]


def test_the_sets_own_split_is_asked_for_by_name(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert evaluate(monkeypatch, photographs, *out, "--split", "1cls") == 2
    assert "listings to choose from exist for realiad" in " ".join(capsys.readouterr().err.split())
    root = make_synthetic(tmp_path / "own", 1, 4, 2, size=64, workers=1, progress=False)
    flags = ["--dataset", "realiad", "--split", "realiad_jsons", *out]
    assert evaluate(monkeypatch, root, *flags) == 0
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert (table["configuration"]["split"], table["records"][0]["trained_on"]) == ("realiad_jsons", 2)
    assert not table["records"][0]["notes"]


def test_images_that_changed_under_their_names_are_other_images(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--products", "bolt", "--out", str(tmp_path / "out")]
    assert evaluate(monkeypatch, photographs, *flags) == 0
    first = cells(tmp_path / "out")
    assert evaluate(monkeypatch, photographs, *flags) == 0
    assert cells(tmp_path / "out") == first
    Image.effect_noise((64, 64), 50).convert("RGB").save(photographs / "bolt" / "test" / "dent" / "3.png")
    assert evaluate(monkeypatch, photographs, *flags) == 0
    assert len(cells(tmp_path / "out")) == 2


def test_tables_and_panels_of_every_kind_of_defect(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only kind's metrics are those of all defects; the panel is of the median-scored image."""
    flags = ["--products", "bolt", "--per-defect", "--panels", "--out", str(tmp_path / "out")]
    assert evaluate(monkeypatch, photographs, *flags) == 0
    (record,) = json.loads((tmp_path / "out" / "table.json").read_text())["records"]
    assert {name: record["metrics"][name] for name in record["defects"]["dent"]} == record["defects"]["dent"]
    for name in ("table.md", "table.tex", "report.html"):
        assert "Defects: dent, against all normal images" in (tmp_path / "out" / name).read_text()
    assert (tmp_path / "out" / "pictures" / "bolt" / "full" / "featurenorm@raw" / "dent.png").is_file()
