"""The source executes nothing that comes in a file; `attacks/` tries it with files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import wherefrom as wf

SOURCE = Path(wf.__file__).parent

# Calls that execute what they read, unless an argument forbids it.
UNPICKLING = {"pickle.load", "pickle.loads", "torch.load", "np.load", "numpy.load", "joblib.load", "dill.loads"}
EXECUTING = {"eval", "exec", "compile", "__import__", "os.system", "yaml.load", "marshal.loads"}
SAFE_ARGUMENTS = {("weights_only", True), ("allow_pickle", False)}


def calls(file: Path) -> Iterator[tuple[str, set[tuple[str | None, object]]]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            constants = [(each.arg, each.value.value) for each in node.keywords if isinstance(each.value, ast.Constant)]
            yield ast.unparse(node.func), set(constants)


def test_the_source_unpickles_and_executes_nothing() -> None:
    found = [
        (str(file.relative_to(SOURCE)), name)
        for file in sorted(SOURCE.rglob("*.py"))
        for name, constants in calls(file)
        if name in EXECUTING
        or (name in UNPICKLING and not constants & SAFE_ARGUMENTS)
        or ("trust_remote_code", True) in constants
    ]
    # What goes between a process and the workers that it started, never a file.
    assert found == [("evaluate/pool.py", "pickle.loads")] * 2
