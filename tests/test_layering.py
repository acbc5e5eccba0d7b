"""The house rules of who imports whom."""

import ast
from graphlib import CycleError, TopologicalSorter
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


def modules() -> dict[str, Path]:
    """Every module of the two packages, and its file."""
    found = {}
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] in ("adpretrain", "downstream"):
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """The modules that a file imports anywhere, for annotations too, with the packages that these lie in."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & known) | ({node.module} if inside - known else set())
    packages = {module.rsplit(".", up)[0] for module in found for up in range(1, module.count(".") + 1)}
    found |= {package for package in packages if not f"{name}.".startswith(f"{package}.")}
    return found & known - {name}


def test_no_module_imports_itself_through_others() -> None:
    found = modules()
    graph = {name: imports(name, path, set(found)) for name, path in found.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))
