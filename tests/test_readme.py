"""Every snippet of the README and docs/inspect.md runs: the python blocks as they are, the commands at a small size."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from products import make_synthetic

from downstream.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
INSPECT = (ROOT / "docs" / "inspect.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.S)


def commands(page: str = README) -> list[str]:
    """Shell lines without comments; continued lines joined."""
    lines = "\n".join(blocks("sh", page)).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


def run(command: list[str], folder: Path, expected: tuple[int, ...] = (0,)) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode in expected, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(blocks("python")) >= 2
    scope: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, scope)
    assert (tmp_path / "my-extractor" / "model.safetensors").is_file()


def test_every_command_is_known_to_this_test() -> None:
    known = (
        "make ",
        "adpretrain ",
        "python hub/convert_official.py",  # these two are run by tests/hub
        "python hub/publish.py",
        "python recipes/draw_products.py",
        "accelerate launch",
        ".venv/bin/python",
        "echo ",
    )
    assert [command for command in commands() if not command.startswith(known)] == []
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert {command.split()[1] for command in commands() if command.startswith("make ")} <= targets


def adpretrain(command: str, expected: tuple[int, ...] = (0,)) -> None:
    """A console command in this process: importing torch anew for each takes longer than what they do."""
    assert main(shlex.split(command)[1:]) in expected, command


@pytest.mark.slow
def test_pretrain_and_inspect_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's own commands, with smaller numbers appended where a flag may be repeated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    make, launch = (next(c for c in commands() if c.startswith(start)) for start in ("python recipes", "accelerate"))
    small = ["--products", "6", "--samples", "6", "--defects", "3", "--size", "128", "--workers", "1"]
    run([*shlex.split(make), *small], tmp_path)
    settings = ["--shots", "[1,3]", "--optim.steps", "4", "--optim.batch_size", "8", "--cache.folder", ""]
    output = run([*shlex.split(launch), *settings], tmp_path)
    assert "extractor saved" in output
    product = sorted((tmp_path / "data" / "synthetic").glob("realiad_*/*"))[0]
    normal, defective = (sorted(product.glob(f"{kind}/**/*.jpg")) for kind in ("OK", "NG"))
    for name, images in (("shots", normal[:3]), ("more", normal[3:]), ("line3", defective)):
        (tmp_path / name).mkdir()
        for index, image in enumerate(images):
            (tmp_path / name / f"{index}.jpg").write_bytes(image.read_bytes())
    score, fitted = (c for c in commands() if c.startswith("adpretrain score"))
    run(shlex.split(score), tmp_path, expected=(0, 1))
    assert (tmp_path / "out" / "report.html").is_file()
    assert (tmp_path / "out" / "scores.csv").read_text().startswith("path,score,p_value,verdict")
    for command in commands(INSPECT):
        adpretrain(command, expected=(0, 1))
    for name in ("extract", "export", "backbones", "fit", "detectors", "info"):
        adpretrain(next(c for c in commands() if c.startswith(f"adpretrain {name}")))
    adpretrain(fitted, expected=(0, 1))
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["detector"] == "fitted/"
    assert (tmp_path / "features" / "index.json").is_file()
    assert (tmp_path / "product.onnx").stat().st_size > 0
    from evaluate import main as evaluate

    program, _, compare = [c for c in commands() if c.startswith("accelerate")][1].partition("recipes/evaluate.py")
    assert program == "accelerate launch "
    assert evaluate([*shlex.split(compare), "--categories", "p000*", "--detectors", "patchcore,featurenorm"]) == 0
    assert {"table.md", "table.csv", "report.html"} <= {path.name for path in (tmp_path / "runs/compare").iterdir()}
    check = next(span for span in re.findall(r"`(adpretrain check-data .*?)`", README))
    adpretrain(check.replace("path/to/set", "data/synthetic"))


@pytest.mark.slow
def test_evaluate_prints_every_row_on_the_same_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_synthetic(tmp_path / "set", 1, 6, 4, size=128, seed=2, workers=1, progress=False)
    scope: dict[str, object] = {}
    monkeypatch.chdir(tmp_path)
    exec(blocks("python")[0], scope)  # an untrained extractor
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    from evaluate import main as evaluate

    flags = ["--extractors", "my-extractor", "--root", str(root), "--shots", "2", "4"]
    assert evaluate([*flags, "--per-defect", "--json", "t.json"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if " norm" in line or "FeatureNorm" in line]
    assert len(rows) >= 8
    # An untrained projector returns its input: the last two rows must agree.
    scaled = [row[-3:] for row in rows if "scaled" in row]
    pretrained = [row[-3:] for row in rows if "pretrained" in row]
    assert scaled == pretrained
    assert (tmp_path / "t.json").is_file()
