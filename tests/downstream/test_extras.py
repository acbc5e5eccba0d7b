"""What a plain `pip install adpretrain` can do, and what it says of the rest."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adpretrain.extras import need

EXTRAS = (
    "accelerate",
    "tensorboard",
    "datasets",
    "pyarrow",
    "transformers",
    "open_clip",
    "gradio",
    "onnx",
    "onnxruntime",
)
WITHOUT = f"""
import sys
from importlib.machinery import PathFinder
class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {EXTRAS} else PathFinder.find_spec(name, path, target)
sys.meta_path = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT + code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_a_missing_package_is_named_with_its_extra() -> None:
    need("train", "json")
    with pytest.raises(ValueError, match=r"no_such_package is needed .*: pip install 'adpretrain\[train\]'"):
        need("train", "no_such_package")


@pytest.mark.slow
def test_the_core_alone_scores(write_tiles: Callable[..., Path], tmp_path: Path) -> None:
    write_tiles("shots", range(4))
    write_tiles("new", range(10, 13))
    flags = ["score", "--normal", "shots", "--images", "new", "--out", "out"]
    found = run(f"from downstream.cli import main; sys.exit(main({flags}))", tmp_path)
    assert found.returncode in (0, 1), found.stderr
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.slow
def test_what_needs_an_extra_names_it(tmp_path: Path) -> None:
    cases = {
        "from adpretrain import load_backbone; load_backbone('dinov2-small', pretrained=False)": "dinov2",
        "from adpretrain import load_backbone; load_backbone('clip-base', pretrained=False)": "clip",
        "from adpretrain.data import index_dataset; index_dataset('hf', 'hf://org/name')": "datasets",
        "import adpretrain.training.run": "train",
        "from downstream.inspection.onnx import check_possible; check_possible()": "export",
    }
    tries = (
        f"for code in {list(cases)}:\n  try: exec(code)\n  except (ValueError, ImportError) as error: print(error)\n"
    )
    said = run(tries, tmp_path).stdout.splitlines()
    assert [line.rpartition("pip install ")[2] for line in said] == [f"'adpretrain[{name}]'" for name in cases.values()]
