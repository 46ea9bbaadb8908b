"""CONTRIBUTING's recipe for a new method: the template is copied, filled and held against the contract."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Scores with (1 / damping) of every gradient: the filter of a curvature that is 0.
FILLED = {
    "class Template(Method):  # FILL: the name": "class Scaled(Method):",
    '"template"  # FILL: the word of `wherefrom score`, and what results are called': '"scaled"',
    "operator = Operator(bases={}, filters={})": (
        "filters = {\n"
        "            name: torch.full(layer.shape, 1 / self.damping, dtype=context.sweep.dtype)\n"
        "            for name, layer in context.sweep.layers.items()\n"
        "        }\n"
        "        operator = Operator(bases={}, filters=filters)"
    ),
    "from wherefrom.curvature.factors": "import torch\n\nfrom wherefrom.curvature.factors",
}

PLUGIN = """
from scaled import Scaled

from tests.contract import methods, truth


def score(run, setting):
    return methods.result(run, setting, Scaled(damping=setting.damping or 1.0))


def expected(setting):
    return truth.factored("identity")(setting) / (setting.damping or 1.0)


no_seed = {"seed": methods.Unsupported("nothing is drawn")}
methods.METHODS["scaled"] = methods.Method(score, expected, unsupported=no_seed)
"""


def test_a_filled_template_keeps_the_contract(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "templates" / "method.py").read_text()
    for old, new in FILLED.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "scaled.py").write_text(text)
    (tmp_path / "plugin.py").write_text(PLUGIN)
    suites = ["tests/test_contract_answers.py", "tests/test_contract_directory.py"]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "-k", "scaled", *suites],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}:{ROOT / 'src'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-2000:]
    assert int(found.stdout.split(" passed")[0].split()[-1]) >= 20
