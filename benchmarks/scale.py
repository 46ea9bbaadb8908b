"""Write `docs/scale.md`: what `wherefrom plan` says of large runs. Some seconds, no GPU, no weights.

python benchmarks/scale.py
"""

from __future__ import annotations

import io
import re
import shlex
from functools import cached_property

import tyro
from rich.console import Console
from tables import rendered
from workload import ROOT

from wherefrom.cli.calculator import Estimate, PlanArguments
from wherefrom.cli.plan import estimate_text
from wherefrom.planning.stages import Stage, duration

DOCUMENT = ROOT / "docs" / "scale.md"
_WIDTH = 100


class Run:
    """One command on the page, with what it prints."""

    def __init__(self, arguments: str) -> None:
        self._given = arguments
        self.estimate = Estimate(tyro.cli(PlanArguments, args=shlex.split(arguments)))

    @property
    def command(self) -> str:
        """As it is typed, with two options a line or three."""
        options = re.split(r" (?=--)", self._given)
        lines = [" ".join(options[start : start + 4]) for start in range(0, len(options), 4)]
        return "wherefrom plan " + " \\\n    ".join(lines)

    @cached_property
    def text(self) -> str:
        """What the command prints."""
        console = Console(file=io.StringIO(), width=_WIDTH, color_system=None)
        with console.capture() as capture:
            console.print(estimate_text(self.estimate))
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def stage(self, name: str) -> Stage:
        """One of the estimate's stages."""
        return next(stage for stage in self.estimate.stages if stage.name == name)


def page() -> str:
    """The document."""
    return rendered("scale.md.jinja", run=Run, duration=duration)


if __name__ == "__main__":
    DOCUMENT.write_text(page())
    print(f"Written: {DOCUMENT}")
