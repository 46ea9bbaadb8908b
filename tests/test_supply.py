"""The locks and the built wheel: that they hold what pyproject.toml and the source say, each with its hash."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import wherefrom

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "requirements"
SOURCE = ROOT / "src"

# Name, version, marker, and the lines of hashes of one locked package.
PIN = re.compile(r"^([\w.-]+)==([\w.+!]+)(?: ; ([^\\\n]+))?((?: *\\\n +--hash=\S+)*)$", re.MULTILINE)
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}(?!\S)")


def pins(lock: str) -> dict[str, list[Version]]:
    """The versions of each package of a lock; several where they depend on Python's."""
    found: dict[str, list[Version]] = {}
    for name, version, _, hashes in PIN.findall((REQUIREMENTS / lock).read_text()):
        assert len(HASH.findall(hashes)) == hashes.count("--hash=") > 0, f"{lock}: {name} lacks a hash"
        found.setdefault(canonicalize_name(name), []).append(Version(version))
    return found


def requirements(*extras: str) -> Iterator[Requirement]:
    """What the project, and its extras with those that they name, ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for each in extras for line in project["optional-dependencies"][each])]
    for requirement in map(Requirement, lines):
        if requirement.name == "wherefrom":
            yield from requirements(*requirement.extras)
        else:
            yield requirement


@pytest.mark.parametrize(
    "lock",
    [
        "lock.txt", "torch.txt", "torch-cpu.txt", "lowest.txt", "lowest-torch.txt", "lowest-torch-cpu.txt",
        "offline-data.txt", "smollm2.txt", "kronfluence.txt",
    ],
)  # fmt: skip
def test_every_line_of_a_lock_is_a_pin_with_hashes(lock: str) -> None:
    text = (REQUIREMENTS / lock).read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", " "))]
    assert len(lines) == sum(map(len, pins(lock).values())) > 0


def test_the_lock_has_every_direct_dependency_within_its_range() -> None:
    locked = pins("lock.txt") | pins("torch.txt")
    for requirement in requirements("dev"):
        versions = locked[canonicalize_name(requirement.name)]
        assert all(version in requirement.specifier for version in versions), requirement


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    locked = pins("lowest.txt") | pins("lowest-torch.txt")
    for requirement in requirements("test"):
        (bound,) = (each for each in requirement.specifier if each.operator == ">=")
        assert locked[canonicalize_name(requirement.name)] == [Version(bound.version)], requirement


@pytest.mark.parametrize(("name", "rest"), [("torch", "lock"), ("lowest-torch", "lowest")])
def test_the_builds_of_torch_are_one_version_and_apart_from_the_rest(name: str, rest: str) -> None:
    (torch,) = pins(f"{name}.txt")["torch"]
    (cpu,) = pins(f"{name}-cpu.txt")["torch"]
    assert (cpu.public, cpu.local) == (str(torch), "cpu")
    assert (REQUIREMENTS / f"{name}.in").read_text().strip() == f"torch=={torch}"
    assert not pins(f"{name}.txt").keys() & pins(f"{rest}.txt").keys()


@pytest.mark.skipif(
    Version(importlib.metadata.version("torch")).public != str(pins("torch.txt")["torch"][0]),
    reason="another torch than the lock's",
)
def test_the_lock_knows_what_torch_needs() -> None:
    (described,) = tomllib.loads((REQUIREMENTS / "uv.toml").read_text())["dependency-metadata"]
    (locked,) = pins("torch.txt")["torch"]
    assert described["version"] == str(locked)
    needed = [each for each in map(Requirement, requires("torch") or []) if "extra" not in str(each.marker)]
    general = {str(each) for each in needed if each.name not in pins("torch.txt")}
    assert {str(Requirement(each)) for each in described["requires-dist"]} == general


def test_every_library_that_is_imported_is_asked_for() -> None:
    asked = {canonicalize_name(each.name) for each in requirements("lora", "evaluate", "serve")}
    distributions = packages_distributions()
    for file in SOURCE.rglob("*.py"):
        for module in imported(file):
            if module not in sys.stdlib_module_names and module != "wherefrom":
                names = {canonicalize_name(each) for each in distributions[module]}
                assert names & asked, f"{file} imports {module}"


def imported(file: Path) -> Iterator[str]:
    """The top-level modules that a file imports, by a statement or by `require`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names):
                yield from (each.name.partition(".")[0] for each in names)
            case ast.ImportFrom(module=str(module)):
                yield module.partition(".")[0]
            case ast.Call(ast.Name("require"), [ast.Constant(str(module)), *_]):
                yield module.partition(".")[0]


@pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="only the locked environment builds")
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"wherefrom-{wherefrom.__version__}-")
    with zipfile.ZipFile(wheel) as opened:
        packed = {name for name in opened.namelist() if ".dist-info/" not in name}
    files = {file.relative_to(SOURCE).as_posix() for file in (SOURCE / "wherefrom").rglob("*") if file.is_file()}
    assert packed == {name for name in files if "__pycache__" not in name}
    assert {"wherefrom/py.typed", "wherefrom/report/templates/report.html"} < packed


def test_a_source_tree_that_is_not_installed_runs() -> None:
    code = """
from importlib import metadata
known = metadata.distribution
def distribution(name):
    if name == "wherefrom":
        raise metadata.PackageNotFoundError(name)
    return known(name)
metadata.distribution = distribution
import wherefrom
print(wherefrom.__version__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=SOURCE)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == wherefrom.__version__
