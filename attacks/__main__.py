"""Run every attack and print what was tried and what stopped it; exits with 1 where one was not stopped."""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from rich.console import Console
from rich.table import Table
from rich.text import Text

import attacks
from attacks.common import stops

NAMES = sorted({each.name for each in iter_modules(attacks.__path__)} - {"common", "__main__"})


def run() -> int:
    """The exit status."""
    table = Table("Attack", "What was tried", "What stopped it", show_lines=True)
    failed = 0
    for name in NAMES:
        module = import_module(f"attacks.{name}")
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = stops(module.live, module.attack, Path(folder))
            except Exception as error:  # also what is none of our errors: it is no refusal
                failed += 1
                table.add_row(name, Text(str(error)), Text(f"NOTHING ({type(error).__name__})", style="bold red"))
                continue
        for number, each in enumerate(found):
            short = each.by if len(each.by) <= 200 else f"{each.by[:199]}…"
            table.add_row("" if number else name, Text(each.tried), Text(short.replace(f"{folder}/", "")))
    Console().print(table)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(run())
