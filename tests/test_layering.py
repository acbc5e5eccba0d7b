"""The house rules of who imports whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"adpretrain", "downstream", "recipes", "hub"}
ALLOWED = {
    "adpretrain": {"adpretrain"},
    "downstream": {"adpretrain", "downstream"},
    "recipes": {"adpretrain", "downstream", "recipes"},
    "hub": {"adpretrain", "downstream", "hub"},
}
ONLY_IN = {"faiss": ("downstream",), "accelerate": ("adpretrain/training", "recipes")}
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imported(source: str, room: str) -> set[str]:
    """Top-level names of everything imported anywhere in a file, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(room if node.level else (node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            found |= {str(a.value).split(".")[0] for a in node.args[:1] if isinstance(a, ast.Constant)}
    return found


def violations(source: str, folder: str) -> set[str]:
    room = folder.partition("/")[0]
    names = imported(source, room)
    return ((names & ROOMS) - ALLOWED[room]) | {n for n in names & set(ONLY_IN) if not folder.startswith(ONLY_IN[n])}


def test_the_checker_sees_every_kind_of_import() -> None:
    assert violations("import downstream.metrics", "adpretrain") == {"downstream"}
    assert violations("def f():\n    from recipes import pretrain", "downstream") == {"recipes"}
    assert violations("import importlib\nimportlib.import_module('faiss.contrib')", "adpretrain") == {"faiss"}
    assert violations("from accelerate import Accelerator", "downstream") == {"accelerate"}
    assert violations("from hub import publish", "recipes") == {"hub"}
    assert violations("from accelerate import Accelerator", "adpretrain/data") == {"accelerate"}
    assert not violations("from accelerate import Accelerator", "adpretrain/training")
    assert not violations("import faiss\nfrom adpretrain import ADExtractor\nfrom . import cli", "downstream")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_house_rules_hold(path: Path) -> None:
    folder = path.relative_to(ROOT).parent.as_posix()
    assert violations(path.read_text(encoding="utf-8"), folder) == set()


def test_the_rooms_were_found() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} >= {"adpretrain", "downstream", "recipes"}
