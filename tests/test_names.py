"""What a user's program imports: the short names, and the types that come with them."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("adpretrain", "downstream")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_short_name_is_the_object_itself(package: str) -> None:
    """The list of names, the places they are loaded from and what a type checker reads say the same."""
    module, tree = importlib.import_module(package), ast.parse((ROOT / package / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    homes = {alias.name: str(node.module) for node in imports for alias in node.names}
    assert set(module.__all__) == set(homes)
    for name, home in homes.items():
        assert getattr(module, name) is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="has no attribute 'PatchCor'"):
        _ = module.PatchCor


def test_a_name_costs_nothing_before_it_is_used() -> None:
    code = "import sys, adpretrain, downstream; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_type_checker_reads_the_installed_package(package: str) -> None:
    """PEP 561: without the marker, mypy takes every object of an installed package for Any, or refuses the import."""
    tomllib = pytest.importorskip("tomllib")
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert (ROOT / package / "py.typed").is_file()
    assert "py.typed" in data[package]
