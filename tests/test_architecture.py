"""The page that follows a training example names functions that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
NAMED = sorted(set(re.findall(r"`(\w+(?:/\w+)*\.py)` `([\w.]+)`", " ".join(PAGE.split()))))


def defined(file: Path) -> set[str]:
    """The functions, classes and methods of a module, by their qualified names."""
    found: set[str] = set()
    kinds = (ast.FunctionDef, ast.ClassDef)
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, kinds):
            found.add(node.name)
            found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, kinds)}
    return found


def test_it_names_many() -> None:
    assert len(NAMED) > 20


@pytest.mark.parametrize(("file", "name"), NAMED, ids=lambda value: value)
def test_what_it_names_is_there(file: str, name: str) -> None:
    assert name in defined(ROOT / "src" / "wherefrom" / file)
