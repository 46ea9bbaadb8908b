"""The house: imports between folders go one way, folders stay small, and so does the code.

`python tests/test_house.py` prints the sizes (`make size`).
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "src" / "wherefrom"
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({file.parent for file in MODULES} - {PACKAGE})
ENGINE = ("runtime", "store", "tasks", "engine", "curvature", "scoring")
MOST_MODULES, MOST_LINES = 9, 450
# A ratchet: what is shorter lowers these. The aim is 15,000 lines in all and 4,000 of code in the engine.
MOST_IN_ALL, MOST_IN_THE_ENGINE = 30_386, 8_818


def floors() -> list[set[str]]:
    """What stands on each floor, from the ground, as CONTRIBUTING says it."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    found = re.search(r"```floors\n(.*?)```", text, re.DOTALL)
    assert found, "CONTRIBUTING.md has no order of folders"
    return [set(line.split()) for line in found[1].split("<-")]


def imported(file: Path) -> Iterator[tuple[str, int]]:
    """The folders or modules of the package that a file imports, also for type checkers alone, with the line."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("wherefrom."):
            yield node.module.split(".")[1], node.lineno


def code_lines(file: Path) -> int:
    """Lines that hold code: no comments, docstrings or blanks."""
    source = file.read_text()
    documented = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = (each for each in tokenize.generate_tokens(io.StringIO(source).readline) if each.type not in layout)
    return len({line for each in tokens for line in range(each.start[0], each.end[0] + 1)} - documented)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down(file: Path) -> None:
    floor = {name: number for number, names in enumerate(floors()) for name in names}
    own = file.relative_to(PACKAGE).with_suffix("").parts[0]
    if own in ("__init__", "__main__", "api", "version"):
        return
    upward = [f"line {line}: {name}" for name, line in imported(file) if floor.get(name, -1) > floor[own]]
    assert not upward, f"{own} may not know what is above it"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(PACKAGE)))
def test_a_folder_can_be_seen_at_once(folder: Path) -> None:
    modules = [file.name for file in folder.glob("*.py") if file.name != "__init__.py"]
    assert len(modules) <= MOST_MODULES, modules
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), "says nothing of what it must not know"


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_can_be_read(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= MOST_LINES


def test_it_does_not_grow() -> None:
    assert sum(lines for lines, _ in sizes().values()) <= MOST_IN_ALL
    assert sum(sizes()[name][1] for name in ENGINE) <= MOST_IN_THE_ENGINE


def sizes() -> dict[str, tuple[int, int]]:
    """Lines and lines of code of every folder, and of the modules beside them."""
    found: dict[str, tuple[int, int]] = {}
    for file in MODULES:
        name = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        lines, code = found.get(name, (0, 0))
        found[name] = lines + len(file.read_text().splitlines()), code + code_lines(file)
    return found


if __name__ == "__main__":
    table = sizes()
    for name, (lines, code) in table.items():
        print(f"{name:12} {lines:6,} lines {code:6,} of code")
    print(f"{'engine':12} {'':6}       {sum(table[name][1] for name in ENGINE):6,} of code")
    print(f"{'all':12} {sum(lines for lines, _ in table.values()):6,} lines")
