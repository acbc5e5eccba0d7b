"""`adpretrain score` as a user runs it, with the real backbone Lite0: files, numbers, exit codes, bad
input.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adpretrain.extractor import ADExtractor
from adpretrain.photographs import read_image
from downstream.cli import main
from downstream.detectors.featurenorm import FeatureNorm, FeatureNormConfig

Write = Callable[..., Path]
MODULES_OF_A_SCORE = 77  # of our files, entered by imports; 91 before the house was redrawn


def score(extractor: Path, normal: Path, images: Path, out: Path, *more: str) -> int:
    folders = ["--extractor", extractor, "--normal", normal, "--images", images, "--out", out]
    return main(["score", *map(str, folders), "--device", "cpu", *more])


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "scores.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def scene(write_tiles: Write, extractor_dir: Path, tmp_path: Path) -> tuple[Path, Path, Path, Path]:
    """Extractor, 4 references, 3 good images and 2 with a dark disc in subfolders, an output folder to be."""
    normal = write_tiles("shots", range(4))
    write_tiles("line/good", range(10, 13))
    write_tiles("line/bad", range(20, 22), blob=True)
    return extractor_dir, normal, tmp_path / "line", tmp_path / "out"


def test_a_run_finds_the_discs_and_writes_everything(
    scene: tuple[Path, Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(*scene, "--false-alarm-rate", "0.2") == 1
    out = scene[3]
    verdicts = {row["path"]: row["verdict"] for row in rows(out)}
    assert list(verdicts) == sorted(verdicts)
    assert verdicts["bad/tile_20.png"] == verdicts["bad/tile_21.png"] == "anomalous"
    assert len(verdicts) == 5
    assert sorted(path.name for path in out.iterdir()) == [
        "heatmaps",
        "masks",
        "regions.csv",
        "regions.json",
        "report.html",
        "scores.csv",
        "summary.json",
    ]
    assert len(list((out / "heatmaps").glob("*.png"))) == 5
    assert "a score is the mean of the heatmap&#39;s highest 1 %" in (out / "report.html").read_text()
    printed = capsys.readouterr().out
    assert "images anomalous (threshold" in printed
    assert "promised false-alarm rate 20 %" in printed
    assert str(out / "report.html") in printed


def test_scores_threshold_and_p_values_are_those_of_the_library(scene: tuple[Path, Path, Path, Path]) -> None:
    extractor_dir, normal, images, out = scene
    score(*scene, "--false-alarm-rate", "0.2", "--batch-size", "2")
    extractor = ADExtractor.from_pretrained(extractor_dir)

    def read(folder: Path) -> torch.Tensor:
        return torch.stack([extractor.preprocess(read_image(path)) for path in sorted(folder.rglob("*.png"))])

    references = read(normal)
    detector = FeatureNorm(extractor, FeatureNormConfig(image_size=64)).fit([references])
    expected = detector.predict(read(images)).scores.numpy()
    loo = detector.leave_one_out(references).scores.numpy()
    measured = [float(row["score"]) for row in rows(out)]
    np.testing.assert_allclose(measured, expected, rtol=1e-5)  # batches of 2 and of 5 round differently
    summary = json.loads((out / "summary.json").read_text())
    assert summary["threshold"] == pytest.approx(loo.max(), rel=1e-6)
    p_values = [(1 + (loo >= value).sum()) / 5 for value in expected]
    np.testing.assert_allclose([float(row["p_value"]) for row in rows(out)], p_values, rtol=1e-12)


def test_json_is_the_only_thing_on_stdout(
    scene: tuple[Path, Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(*scene, "--json") == 1
    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads((scene[3] / "summary.json").read_text())
    assert summary["counts"]["anomalous"] + summary["counts"]["normal"] == 5
    assert summary["promised_false_alarm_rate"] == pytest.approx(0.2)
    assert "cannot promise a false-alarm rate of 5 %" in summary["warnings"][0]


def test_good_images_under_a_high_threshold_exit_0(
    scene: tuple[Path, Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    extractor_dir, normal, images, out = scene
    assert score(extractor_dir, normal, images / "good", out, "--threshold", "1e9") == 0
    assert "0 of 3 images anomalous" in capsys.readouterr().out
    summary = json.loads((scene[3] / "summary.json").read_text())
    assert summary["promised_false_alarm_rate"] is None
    assert "no false-alarm rate is promised. 0 of 4 normal" in summary["warnings"][0]


def test_extra_normal_photographs_make_the_asked_rate_reachable(
    scene: tuple[Path, Path, Path, Path], write_tiles: Write
) -> None:
    more = write_tiles("more", range(100, 119))
    (more / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    score(*scene, "--calibration", str(more))
    summary = json.loads((scene[3] / "summary.json").read_text())
    assert summary["promised_false_alarm_rate"] == pytest.approx(0.05)
    assert len(summary["calibration_scores"]) == 19
    assert len(summary["warnings"]) == 1
    assert "cut.png" in summary["warnings"][0]


def test_photographs_beyond_the_shots_calibrate(scene: tuple[Path, Path, Path, Path], write_tiles: Write) -> None:
    write_tiles("shots", range(30, 49))  # 23 in all: 4 references, 19 others
    score(*scene, "--shots", "4")
    summary = json.loads((scene[3] / "summary.json").read_text())
    assert summary["references"] == 4
    assert len(summary["calibration_scores"]) == 19
    assert summary["promised_false_alarm_rate"] == pytest.approx(0.05)


def test_calibration_photographs_that_are_references_are_left_out(
    scene: tuple[Path, Path, Path, Path],
) -> None:
    score(*scene, "--calibration", str(scene[1]))
    summary = json.loads((scene[3] / "summary.json").read_text())
    assert len(summary["calibration_scores"]) == 4
    assert any("4 calibration photograph(s) are references too" in text for text in summary["warnings"])


def test_copies_among_the_references_are_noticed(scene: tuple[Path, Path, Path, Path]) -> None:
    shutil.copy(scene[1] / "tile_0.png", scene[1] / "again.png")
    score(*scene)
    warnings = json.loads((scene[3] / "summary.json").read_text())["warnings"]
    assert any(
        text.startswith("1 of the references are copies") and "tile_0.png of again.png" in text for text in warnings
    )


def test_one_reference_ranks_without_verdicts(
    write_tiles: Write, extractor_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    normal = write_tiles("shots", range(1))
    write_tiles("line", range(10, 12))
    images = write_tiles("line", range(20, 21), blob=True, prefix="bad")
    assert score(extractor_dir, normal, images, tmp_path / "out") == 3
    table = rows(tmp_path / "out")
    assert {row["verdict"] for row in table} == {"undecided"}
    assert {row["p_value"] for row in table} == {""}
    assert max(table, key=lambda row: float(row["score"]))["path"] == "bad_20.png"
    printed = capsys.readouterr().out
    assert "One normal photograph cannot be compared" in printed
    assert printed.index("bad_20.png") < printed.index("tile_10.png")
    assert len(list((tmp_path / "out" / "heatmaps").iterdir())) == 3


def test_unreadable_images_are_listed_and_do_not_stop_the_run(
    scene: tuple[Path, Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    line = scene[2]
    whole = (line / "good" / "tile_10.png").read_bytes()
    (line / "good" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (line / "empty.jpg").write_bytes(b"")
    (line / "text.png").write_text("not an image")
    bad = (line / "bad").rename(scene[3].with_name("bad"))
    assert score(*scene, "--threshold", "1e9") == 3
    unreadable = [row for row in rows(scene[3]) if row["verdict"] == "unreadable"]
    assert [row["path"] for row in unreadable] == ["empty.jpg", "good/cut.png", "text.png"]
    assert {(row["score"], row["p_value"]) for row in unreadable} == {("", "")}
    assert "good/cut.png" in capsys.readouterr().out
    entries = json.loads((scene[3] / "summary.json").read_text())["images"]
    assert all(entry["reason"] for entry in entries if entry["verdict"] == "unreadable")
    bad.rename(line / "bad")
    assert score(*scene, "--false-alarm-rate", "0.2") == 1  # an anomaly is the more urgent news


def test_every_kind_of_picture_and_name_is_scored(write_tiles: Write, extractor_dir: Path, tmp_path: Path) -> None:
    normal = write_tiles("shots", range(2))
    Image.open(normal / "tile_0.png").resize((200, 200)).save(normal / "larger.jpg")
    line = write_tiles("line", range(5, 6))
    photo = Image.open(line / "tile_5.png")
    gray16 = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    Image.fromarray(gray16).save(line / "16bit.png")
    photo.convert("RGBA").save(line / "rgba.png")
    photo.convert("L").save(line / "gray.TIF")
    photo.convert("P").save(line / "palette.bmp")
    photo.resize((300, 100)).save(line / "wide.webp")
    photo.save(line / "<img src=x onerror=alert(1)>.png")
    photo.save(line / '=cmd, "quoted"\nname.png')
    photo.save(os.fsencode(line) + b"/latin-\xe9.png")
    (line / "a").mkdir()
    photo.save(line / "a" / "b.png")
    photo.save(line / "a_b.png")  # its heatmap must not overwrite that of a/b.png
    photo.save(line / "a_b.jpg")
    photo.save(line / ".hidden.png")
    (line / "notes.txt").write_text("no image")
    assert score(extractor_dir, normal, line, tmp_path / "out", "--threshold", "1e9") == 1
    unlike = {row["path"]: row["reason"] for row in rows(tmp_path / "out") if row["verdict"] == "anomalous"}
    unlike.pop("palette.bmp", None)  # its dithering is about as much noise as three normals allow
    assert unlike == dict.fromkeys(("16bit.png", "gray.TIF"), "unlike the normals: colour")
    table = rows(tmp_path / "out")
    assert len(table) == 12
    assert all((line / row["path"]).is_file() for row in table)  # names survive the CSV byte for byte
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    heatmaps = [entry["heatmap"] for entry in summary["images"]]
    assert len(set(heatmaps)) == len(list((tmp_path / "out" / "heatmaps").iterdir())) == 12
    assert any("1 of 12 images have a shape" in text for text in summary["warnings"])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;.png" in page


def test_a_second_run_into_the_same_folder_leaves_no_stale_heatmap(
    scene: tuple[Path, Path, Path, Path],
) -> None:
    *_, images, out = scene
    score(*scene)
    mine = out / "heatmaps" / "mine.png"
    Image.new("RGB", (4, 4)).save(mine)
    shutil.rmtree(images / "bad")
    score(*scene)
    assert sorted(path.name for path in (out / "heatmaps").iterdir()) == [
        "good_tile_10.png",
        "good_tile_11.png",
        "good_tile_12.png",
        "mine.png",
    ]


def test_results_inside_the_images_folder_are_not_scored(scene: tuple[Path, Path, Path, Path]) -> None:
    extractor, normal, images, _ = scene
    for _ in range(2):
        score(extractor, normal, images, images / "out")
    assert len(rows(images / "out")) == 5


def test_two_runs_give_the_same_bytes(scene: tuple[Path, Path, Path, Path], tmp_path: Path) -> None:
    for out in ("one", "two"):
        score(*scene[:3], tmp_path / out)
    for name in ("scores.csv", "heatmaps/bad_tile_20.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda e, n, i, o: (e / "none", n, i, o), "expected a folder written by"),
        (lambda e, n, i, o: (i, n, i, o), "has no config.json"),
        (lambda e, n, i, o: (e, n / "none", i, o), "no such folder"),
        (lambda e, n, i, o: (e, n, i / "none", o), "no such folder"),
        (lambda e, n, i, o: (e, n, e, o), "no images in"),
        (lambda e, n, i, o: (e, n, i, n / "tile_0.png"), "tile_0.png is a file: --out names a folder"),
        (lambda e, n, i, o: (e, n, i, i), "lies in the output folder"),
        (lambda e, n, i, o: (e, n, i, i.parent), "lies in the output folder"),
        (lambda e, n, i, o: (e, n, i, n), "lies in the output folder"),
        (lambda e, n, i, o: (e, n, i, Path("/dev/null/out")), "/dev/null"),
    ],
)
def test_wrong_folders_exit_2_with_one_line(
    scene: tuple[Path, Path, Path, Path],
    break_it: Callable[..., tuple[Path, Path, Path, Path]],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert score(*break_it(*scene)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1  # no traceback


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--false-alarm-rate", "5"], "expected a share between 0 and 1"),
        (
            ["--false-alarm-rate", "0"],
            "cannot be promised by any number of photographs: n normal ones promise 1 in n + 1",
        ),
        (["--decimal-comma", "--csv-separator", ","], "a comma cannot stand both between fields and in numbers"),
        (["--batch-size", "0"], "expected at least 1"),
        (["--threshold", "nan"], "--threshold nan: expected a number; see adpretrain score --help"),
        (["--shots", "3.5"], "--shots 3.5: expected a whole number"),
        (["--references", "nearest"], "--references nearest: expected one of even, random, kmeans, aligned"),
        (["--device", "abacus"], "cannot be used here"),
        (["--calibration", "/none"], "no such folder"),
        (["--fales-alarm-rate", "0.1"], "unknown option --fales-alarm-rate (did you mean --false-alarm-rate?); known"),
        (["--resume=yes"], "--resume"),
    ],
)
def test_wrong_options_exit_2(
    scene: tuple[Path, Path, Path, Path],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert score(*scene, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "--images", "a"], "adpretrain score: error: needed: --out; see adpretrain score --help\n"),
        (["score", "--images", "a", "--out", "b"], "needed: --normal GOOD, a folder of normal photographs, or --at"),
        (["push"], "adpretrain push: error: needed: FOLDER, --repo-id; see adpretrain push --help\n"),
        ([], "adpretrain: error: needed: COMMAND, such as score; see adpretrain --help\n"),
        (["scor"], "adpretrain: error: argument command: invalid choice: 'scor'"),
        (["score", "--config", "none.yaml"], "File does not exist: "),
        (["score", "--config", "shotz.yaml"], "unknown option --shotz (did you mean --shots?); known are --help"),
        (["score", "--config", "torn.yaml"], "while parsing a flow sequence"),
        (["fit", "--levels", "7"], "adpretrain fit: error: --levels 7: expected a list, such as [1,2]; see"),
        (
            ["push", "a", "--repo-id", "b/c", "--visibility", "all"],
            "--visibility all: expected one of private, public;",
        ),
    ],
)
def test_a_wrong_command_line_is_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shotz.yaml").write_text("normal: a\nimages: b\nout: c\nshotz: 3\n")
    Path("torn.yaml").write_text("normal: [a\n")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_truncated_reference_is_an_error_that_names_it(
    scene: tuple[Path, Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (scene[1] / "zz.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert score(*scene) == 2
    assert "zz.png" in capsys.readouterr().err


def test_help_tells_the_exit_codes_and_loads_no_torch() -> None:
    code = (
        "import sys; from downstream.cli import main; code = main(['score', '--help']); "
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0
    assert "  1  at least one image is anomalous" in done.stdout
    assert "  3  no anomaly was found, but none can be" in done.stdout


def test_a_score_enters_few_of_our_modules(write_tiles: Write, extractor_dir: Path, tmp_path: Path) -> None:
    folders = {"normal": write_tiles("normal", range(2)), "images": write_tiles("images", range(3, 4))}
    options = [f"--{name}={folder}" for name, folder in folders.items()]
    options += [f"--extractor={extractor_dir}", f"--out={tmp_path / 'out'}", "--device=cpu", "--threshold=1e9"]
    code = (
        f"import sys; from downstream.cli import main; assert main(['score', *{options}]) == 0; "
        "print(*(name for name in sys.modules if name.split('.')[0] in ('adpretrain', 'downstream')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    entered = done.stdout.splitlines()[-1].split()
    assert sum(name.startswith("downstream.inspection") for name in entered) <= 21
    assert len(entered) <= MODULES_OF_A_SCORE, sorted(entered)


@pytest.mark.parametrize("method", ["even", "random", "kmeans"])
def test_chosen_references_leave_the_others_to_calibrate(
    scene: tuple[Path, Path, Path, Path], write_tiles: Write, method: str
) -> None:
    write_tiles("shots", range(30, 34))  # 8 in all
    score(*scene, "--references", method, "--shots", "3", "--seed", "5")
    summary = json.loads((scene[3] / "summary.json").read_text())
    assert (summary["references"], summary["reference_choice"], summary["shots"]) == (3, method, 3)
    assert len(summary["calibration_scores"]) == 3 + 5


def test_aligned_references_calibrate_on_the_whole_pool(
    scene: tuple[Path, Path, Path, Path], write_tiles: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiles("shots", range(30, 46))  # 20 in all
    assert score(*scene, "--references", "aligned", "--shots", "2") == 1
    summary = json.loads((scene[3] / "summary.json").read_text())
    assert len(summary["calibration_scores"]) == summary["references"] == 20
    assert summary["promised_false_alarm_rate"] == pytest.approx(1 / 21)
    assert "the 2 best aligned references for every image" in (scene[3] / "report.html").read_text()
    assert score(*scene, "--references", "nearest") == 2
    assert "kmeans" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """As in `adpretrain info embedded | head -1`, but for sure: nobody reads."""
    command = [sys.executable, "-m", "downstream.cli", "info", "embedded"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
