"""Every snippet of the README and of docs/ runs: the Python blocks as they are, the commands at a small size."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from downstream.cli import main
from downstream.commands import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
BIN = Path(sys.executable).parent


def blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.S)


def commands(*pages: str) -> list[str]:
    """Shell lines of some pages (all by default), without comments; continued lines joined."""
    text = "\n".join(block for page in pages or PAGES for block in blocks("sh", page))
    lines = text.replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("page", [page for page in PAGES if blocks("python", page)])
def test_python_blocks_run_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in blocks("python", page):
        exec(block, scope)


def test_every_command_is_known_to_this_test() -> None:
    known = (
        "make ",
        "adpretrain ",
        "accelerate launch ",
        "pip ",
        "python recipes/",
        "python hub/",  # run by tests/hub and tests/backbones
        "sbatch ",  # tests/recipes/test_clusters.py
    )
    assert [command for command in commands() if not command.startswith(known)] == []
    scripts = [word for command in commands() for word in command.split() if word.startswith(("recipes/", "hub/"))]
    assert [script for script in scripts if not (ROOT / script).exists()] == []
    lines = re.findall(r"^([a-z][\w -]*):", (ROOT / "Makefile").read_text(), flags=re.M)
    targets = {target for line in lines for target in line.split()}
    assert {command.split()[1] for command in commands() if command.startswith("make ")} <= targets
    assert {command.split()[1] for command in commands() if command.startswith("adpretrain ")} <= {*COMMANDS}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    folder = ROOT if page == "README" else ROOT / "docs"
    links = re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)|<img src=\"([^\"]+)\"", PAGES[page])
    near = [link or image for link, image in links if "://" not in (link or image)]
    assert [link for link in near if not (folder / link).is_file()] == []
    if page != "README":
        assert f": {page}.md\n" in (ROOT / "mkdocs.yml").read_text(), f"docs/{page}.md is not in the site's navigation"


def adpretrain(command: str, expected: tuple[int, ...] = (0,)) -> None:
    """A console command in this process: importing torch anew for each takes longer than what they do."""
    assert main(shlex.split(command)[1:]) in expected, command


@pytest.mark.slow
def test_pretrain_and_inspect_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages' own commands, with smaller numbers appended where a flag may be repeated."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    draw = next(c for c in commands("README") if c.startswith("python recipes/draw_products.py"))
    launch = next(c for c in commands("README") if c.startswith("accelerate launch recipes/pretrain.py"))
    small = ["--products", "6", "--samples", "6", "--defects", "3", "--size", "128", "--workers", "1"]
    run([*shlex.split(draw), *small], tmp_path)
    settings = ["--shots", "[1,3]", "--optim.steps", "4", "--optim.batch_size", "8", "--cache.folder", ""]
    settings += ["--backbone.image_size", "64"]
    output = run([*shlex.split(launch), *settings], tmp_path)
    assert "extractor saved" in output
    product = sorted((tmp_path / "data" / "synthetic").glob("realiad_*/*"))[0]
    normal, defective = (sorted(product.glob(f"{kind}/**/*.jpg")) for kind in ("OK", "NG"))
    for name, images in (("shots", normal[:3]), ("more", normal[3:]), ("line3", defective)):
        (tmp_path / name).mkdir()
        for index, image in enumerate(images):
            (tmp_path / name / f"{index}.jpg").write_bytes(image.read_bytes())
    score, fitted = (c for c in commands("README") if c.startswith("adpretrain score"))
    adpretrain(score, expected=(0, 1))  # as a program: tests/recipes/test_quickstart.py
    assert (tmp_path / "out" / "report.html").is_file()
    assert (tmp_path / "out" / "scores.csv").read_text().startswith("path,score,p_value,verdict")
    Image.new("L", (128, 128), "white").save("roi.png")
    for command in commands("inspect"):
        if command.startswith("adpretrain "):
            adpretrain(f"{command} --tile 64" if "--tile" in command else command, expected=(0, 1))
    assert {"regions.csv", "regions.json", "masks", "maps", "scores.xlsx"} <= {
        path.name for path in Path("out").iterdir()
    }
    for name in ("extract", "backbones", "fit", "detectors", "info"):
        adpretrain(next(c for c in commands() if c.startswith(f"adpretrain {name}")))
    adpretrain(fitted, expected=(0, 1))
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["detector"] == "fitted/"
    assert (tmp_path / "features" / "index.json").is_file()
    assert (tmp_path / "product.onnx").stat().st_size > 0
    check = next(c for c in commands("data") if c.startswith("adpretrain check-data"))
    adpretrain(check.replace("path/to/set", "data/synthetic"))
    from evaluate import main as evaluate

    launches = [c for c in commands("evaluate") if c.startswith("accelerate launch recipes/evaluate.py")]
    compare = shlex.split(launches[0])[3:]
    assert evaluate([*compare, "--products", "p000*", "--detectors", "patchcore,featurenorm"]) == 0
    assert {"table.md", "table.csv", "report.html"} <= {path.name for path in (tmp_path / "runs/compare").iterdir()}
